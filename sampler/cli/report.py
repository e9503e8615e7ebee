"""What a command tells: results on stdout, everything for humans on stderr, errors as one line."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_EVERY = 10.0  # seconds between progress lines where stderr is no terminal


@dataclass(frozen=True)
class Report:
    """How one command answers. as_json: stdout is JSON Lines events instead of plain results."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def result(self, text: str) -> None:
        """One line of the result, where no events are asked for."""
        if not self.as_json:
            print(printable(text), flush=True)

    def event(self, kind: str, /, **content: Any) -> None:
        """One event {"v": 1, "t": kind, "time": unix seconds, ...}, where events are asked for."""
        if self.as_json:
            line = {"v": 1, "t": kind, "time": round(time.time(), 3), **content}
            print(json.dumps(line, ensure_ascii=False, allow_nan=False), flush=True)

    def note(self, text: str) -> None:
        """One line for the human."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """One line for the human who asked for more."""
        if self.verbose:
            print(printable(text), file=sys.stderr, flush=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what is raised inside into one line on stderr and the exit code."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = self._warned
                yield
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # The reader has gone: nothing more can be told, nor flushed at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if self.debug:
                import traceback

                traceback.print_exc()
            text, code = explained(error)
            self.event("error", code=code, message=text)
            print(f"sampler: {printable(text)}", file=sys.stderr, flush=True)
            raise typer.Exit(code) from None

    def _warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.event("warning", message=str(message))
        self.note(f"sampler: warning: {' '.join(str(message).split())}")

    @contextmanager
    def progress(self, total: int) -> Iterator[Meter]:
        """Counts images: a bar with ETA on a terminal, else one plain line per 10 seconds."""
        if self.quiet or not sys.stderr.isatty():
            yield Meter(total, self)
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), Remaining())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            bar.add_task("images", total=total)
            yield Meter(total, self, bar)


class Meter:
    """Images done, of how many, and since when."""

    def __init__(self, total: int, report: Report, bar: Progress | None = None) -> None:
        self.total, self.report, self.bar = total, report, bar
        self.done = 0
        self.started = self.told = time.monotonic()

    def advance(self, count: int) -> None:
        """So many more images are done."""
        self.done += count
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], count)
            return
        now = time.monotonic()
        if now - self.told >= PLAIN_EVERY:
            self.told = now
            left = (now - self.started) / self.done * (self.total - self.done)
            self.report.note(f"{self.done} of {self.total} images, {left:.0f} s left")


def explained(error: BaseException) -> tuple[str, int]:
    """An error as one sentence and the exit code it stands for."""
    from sampler.types import SamplerError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SamplerError):
        return text, error.code
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", 130
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Out of memory; use a smaller --batch-size, --width or --height.", 7
    if isinstance(error, ValueError):
        return text, 2
    if isinstance(error, OSError):
        return text, 5
    return f"Internal error: {type(error).__name__}: {text} (--debug shows where).", 1


def printable(text: str) -> str:
    """Text without control characters, so that it cannot steer a terminal."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "?" for c in text)
