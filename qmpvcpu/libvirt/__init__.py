"""libvirt's domains over libvirt-python; imported only where a libvirt URI is given."""
