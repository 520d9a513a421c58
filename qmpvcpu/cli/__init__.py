"""The command line: parse, call, render. `main` answers --version before anything else is loaded."""

import sys

__all__ = ["main"]


def main() -> int:
    """Entry point of the `qmpvcpu` command; returns the exit code."""
    arguments = sys.argv[1:]
    if "--version" in arguments:
        from qmpvcpu._version import __version__

        print(f'{{"version": "{__version__}"}}' if "--json" in arguments else f"qmpvcpu {__version__}")
        return 0
    try:
        from qmpvcpu.cli.run import run

        return run(arguments)
    except KeyboardInterrupt:
        # While modules are still being loaded: nothing has been touched.
        print("qmpvcpu: interrupted", file=sys.stderr)
        return 130
