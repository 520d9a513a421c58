"""Tools for testers: guests, QEMUs and a libvirtd of our own, the comparison with libvirt, and the
demonstration.
"""
