"""`python -m qmpvcpu` is the command `qmpvcpu`."""

from qmpvcpu.cli import program

program()
