"""The transaction: inputs in, effects out, and the one report of how it ended. Pure."""
