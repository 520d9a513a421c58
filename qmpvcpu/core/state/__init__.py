"""The replies of QEMU, the guest agent and libvirt, read into `DomainState` and related values.
Pure.
"""
