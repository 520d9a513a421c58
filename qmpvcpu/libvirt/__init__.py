"""libvirt's domains by libvirt-python. This package is imported only if a libvirt URI is given."""
