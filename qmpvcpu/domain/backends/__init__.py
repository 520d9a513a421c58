"""How a domain is reached: over QMP, or through libvirt."""
