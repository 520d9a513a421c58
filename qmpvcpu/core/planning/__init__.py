"""State and request to the steps to take, for the running guest and for the definition. Pure."""
