"""What testers need: guests, QEMUs and a libvirtd of our own, the comparison with libvirt, the demonstration."""
