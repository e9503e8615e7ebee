"""Entry point of the command `sampler`.

Interrupts and output streams are prepared here, before anything else is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

_INTERRUPTED = 128 + signal.SIGINT


def main() -> int:
    """Run the command line of this process and return its exit code.

    Ctrl-C ends it in one sentence, also during imports. Characters that the encoding of an output
    stream lacks are written as escapes.
    """
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _show_unraisable
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        from sampler.cli import commands

        return commands.run()
    except KeyboardInterrupt:
        _end()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the interpreter shuts down


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt inside a command, and end the process during start-up and imports.

    An exception inside an import would be lost: extension modules print or replace it.
    """
    in_command = False
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        in_command |= frame.f_globals.get("__name__") == "sampler.cli.commands"
        frame = frame.f_back
    if in_command:
        raise KeyboardInterrupt
    _end()


def _show_unraisable(what: Any) -> None:
    """End the process for an interrupt in a finalizer or callback, which Python would drop."""
    if what.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(what)


def _end() -> NoReturn:
    """Report the interrupt without Python's buffers, whose locks may be held, and exit."""
    if "--json" in sys.argv:
        event = f'{{"v": 1, "t": "error", "time": {time.time():.3f}, "code": {_INTERRUPTED}, '
        os.write(1, f'{event}"message": "Interrupted."}}\n'.encode())
    os.write(2, b"sampler: Interrupted.\n")
    os._exit(_INTERRUPTED)
