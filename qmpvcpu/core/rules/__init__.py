"""Every decision to refuse, by topic: state and request in, reasons out. Pure."""
