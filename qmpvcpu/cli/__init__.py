"""The command line: parse, call, render. `main` answers --version before it loads anything else."""

import os
import sys

# Type checkers treat this name as true. Importing `typing` for it would cost more than the rest of
# this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from qmpvcpu.cli.signals import Signals


def main() -> int:
    """Run the command in `sys.argv` in this process, and handle its signals meanwhile; return the
    exit code.
    """
    signals = _handled()
    try:
        return _run(signals)
    finally:
        signals.restore()


def program() -> "NoReturn":
    """Entry point of the `qmpvcpu` command.

    It ends the process itself, because a signal or a failed flush while the interpreter exits would
    change the exit code.
    """
    signals = _handled()
    signals.owns_process = True
    _fill_standard_streams()
    if "--debug" not in sys.argv:
        # Hide "Exception ignored in": a user cannot do anything about an error in a destructor.
        sys.unraisablehook = lambda _: None
    os._exit(_run(signals))


def _handled() -> "Signals":
    interrupted = False
    while True:
        # A signal may arrive before our handler is installed. It should lead to the same message as
        # later ones.
        try:
            try:
                from qmpvcpu.cli.signals import Signals

                signals = Signals()
                signals.install()
                break
            except KeyboardInterrupt:
                interrupted = True
        except KeyboardInterrupt:
            # A second signal arrived while the first was recorded.
            interrupted = True
    if interrupted:
        signals.interrupt()
    return signals


def _fill_standard_streams() -> None:
    """Open those of 0, 1 and 2 that are closed, because QEMU's socket must not become our
    stderr.
    """
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

        output.write(
            f'{{"version": "{__version__}"}}\n' if output.is_json else f"qmpvcpu {__version__}\n"
        )
        return output.end(0)
    from qmpvcpu.cli.run import run

    return run(arguments, output, signals)
