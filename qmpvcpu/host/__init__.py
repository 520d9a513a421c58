"""Host placement of vCPU threads: affinity, scheduler, cgroups, and files kept safely."""
