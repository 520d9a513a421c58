"""What QEMU, the guest agent and libvirt reply, read into `DomainState` and what goes with it. Pure."""
