"""Every decision to refuse, by topic: a state and a request in, refusals out. Pure."""
