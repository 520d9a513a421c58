"""Machines that are described and not asked: what each QEMU makes of -smp, -numa and machine names."""
