"""Pure decisions: data in, data out. Nothing here reads a clock, a file or a socket."""
