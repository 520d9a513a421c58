"""Pure decisions: data in, data out. No module of this package reads a clock, a file or a
socket.
"""
