"""The QEMU edge: monitor (QMP), processes we start. Imports `core` and `ports` only."""
