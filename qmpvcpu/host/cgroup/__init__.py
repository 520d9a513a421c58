"""Groups for the threads of vCPUs, in this host's cgroup hierarchies."""
