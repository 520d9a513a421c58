"""The command line: parse, call, render. `main` answers --version before anything else is loaded."""

import os
import sys

# Type checkers read this name as true; importing `typing` for it would cost more than the rest of this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qmpvcpu.cli.signals import Signals

__all__ = ["main", "program"]


def main() -> int:
    """Run the command of `sys.argv` in this process, whose signals it handles meanwhile; returns the exit code."""
    signals = _handled()
    try:
        return _run(signals)
    finally:
        signals.restore()


def program() -> "NoReturn":
    """Entry point of the `qmpvcpu` command.

    It ends the process itself: whatever happens while the interpreter ends (a signal, a stream that cannot be
    flushed) would change the exit code.
    """
    signals = _handled()
    signals.owns_process = True
    _fill_standard_streams()
    if "--debug" not in sys.argv:
        # "Exception ignored in": what a destructor cannot do is nothing that a user could mend.
        sys.unraisablehook = lambda _: None
    os._exit(_run(signals))


def _handled() -> "Signals":
    interrupted = False
    while True:
        # Before there is a handler. The command has its one way of saying so.
        try:
            try:
                from qmpvcpu.cli.signals import Signals

                signals = Signals()
                signals.install()
                break
            except KeyboardInterrupt:
                interrupted = True
        except KeyboardInterrupt:
            # One more, while the first was noted.
            interrupted = True
    if interrupted:
        signals.interrupt()
    return signals


def _fill_standard_streams() -> None:
    """Open what is closed of 0, 1 and 2: QEMU's socket must not become our stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            try:
                os.open(os.devnull, os.O_RDWR)
            except OSError:
                return


def _run(signals: "Signals") -> int:
    from qmpvcpu.cli.output import Output

    arguments = sys.argv[1:]
    output = Output(signals, is_json="--json" in arguments)
    if "--version" in arguments:
        from qmpvcpu._version import __version__

        output.write(f'{{"version": "{__version__}"}}\n' if output.is_json else f"qmpvcpu {__version__}\n")
        return output.end(0)
    from qmpvcpu.cli.run import run

    return run(arguments, output, signals)
