"""Domain XML documents that tests share."""

from __future__ import annotations

#: As libvirt writes it, of eight vCPUs.
LIBVIRT = b"""<domain type='kvm' id='3'>
  <name>web1</name>
  <uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>
  <metadata><app:x xmlns:app='urn:x'><vcpu>99</vcpu></app:x></metadata>
  <vcpu placement='static' cpuset='0-3,^2' current='3'>8</vcpu>
  <vcpus>
    <vcpu id='0' enabled='yes' hotpluggable='no' order='1'/>
    <vcpu id='1' enabled='yes' hotpluggable='yes' order='2'/>
    <vcpu id='2' enabled='no' hotpluggable='yes'/>
    <vcpu id='3' enabled='no' hotpluggable='yes'/>
    <vcpu id='4' enabled='no' hotpluggable='yes'/>
    <vcpu id='5' enabled='yes' hotpluggable='yes' order='3'/>
    <vcpu id='6' enabled='no' hotpluggable='yes'/>
    <vcpu id='7' enabled='no' hotpluggable='yes'/>
  </vcpus>
  <iothreads>2</iothreads>
  <cputune>
    <shares>2048</shares>
    <vcpupin vcpu='1' cpuset='1-2'/>
    <vcpupin vcpu='900' cpuset='1'/>
    <emulatorpin cpuset='0'/>
    <vcpusched vcpus='0-1,5' scheduler='fifo' priority='10'/>
    <vcpusched vcpus='6' scheduler='batch'/>
  </cputune>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <cpu mode='host-passthrough'>
    <topology sockets='2' dies='1' cores='2' threads='2'/>
    <numa>
      <cell id='0' cpus='0-3' memory='1048576' unit='KiB'/>
      <cell id='1' cpus='4-7' memory='1048576' unit='KiB'/>
    </numa>
  </cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <channel type='unix'>
      <source mode='bind' path='/run/web1.agent'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
  </devices>
</domain>
"""

#: In the dialect of the RFC.
RFC = b"""<domain>
\t<name>rfc</name>
\t<vcpu current='1'>3</vcpu>
\t<vcpus>
\t\t<vcpu id='0' state='enabled'/>
\t\t<vcpu id="1" state="disabled" cell='7'/>
\t\t<vcpu id='2' state='enabled' cell='1' pin='1-2' scheduler='fifo:10'/>
\t</vcpus>
</domain>"""
#: Without `<vcpus>`.
PLAIN = b"<domain><name>n</name>\n  <vcpu>4</vcpu>\n</domain>"

#: By hand: comments, white space, other namespaces, elements out of order.
ODD = b"""<domain xmlns:x='urn:x'>
  <name>odd</name>
  <vcpu current = "3" >  8</vcpu  >
  <vcpus  ><!-- <vcpu id='0'/> -->
     <vcpu  enabled = "yes" id="0"   hotpluggable='no'></vcpu>
     <vcpu id='5' hotpluggable='yes' enabled='yes' /> <?pi x?>
     <x:note/>
     <vcpu hotpluggable='yes' id='3' enabled='yes'/>
  </vcpus>
</domain>
"""
