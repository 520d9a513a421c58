"""The same ports over libvirt-python; imported only when a libvirt URI is asked for."""
