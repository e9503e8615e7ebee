"""Output of commands: results on stdout, messages for people on stderr, errors in one line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from sampler.cli.progress import Meter, Record, Updates

if TYPE_CHECKING:
    from rich.progress import Progress

# `token=...`, "secret": "...", --password ..., HF_API_KEY=...; a lone "key" is that of an image.
_SECRET = re.compile(
    r"((?:[\w-]*(?:token|secret|password)|[\w-]+[_-]key)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&}]+",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(\w://)[^/\s@]+@")


@dataclass(frozen=True)
class Report:
    """Output streams of one command.

    as_json: stdout is JSON Lines events, not plain results. muted: errors only, for the processes
    of a run other than the first. results: False leaves out plain results, of a command inside of
    another one.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    muted: bool = False
    results: bool = True

    def result(self, text: str) -> None:
        """Print a result, unless stdout is for events."""
        if self.results and not self.as_json and not self.muted:
            print("\n".join(map(printable, text.split("\n"))), flush=True)

    def event(self, kind: str, /, **content: Any) -> None:
        """Print the event {"v": 1, "t": kind, "time": unix seconds, ...}, if --json was given."""
        if self.as_json and not self.muted:
            line = {"v": 1, "t": kind, "time": round(time.time(), 3), **content}
            print(json.dumps(line, allow_nan=False), flush=True)

    def table(
        self,
        kind: str,
        rows: Sequence[Mapping[str, Any]],
        shown: int | None = None,
        title: str = "",
    ) -> None:
        """Print rows of equal fields as an aligned table, and an event per row.

        shown: rows that the table has; a last line counts the others.
        """
        for row in rows:
            self.event(kind, **row)
        if title:
            self.result(title)
        cells = [list(rows[0]), *([_cell(v) for v in row.values()] for row in rows[:shown])]
        widths = [max(len(line[k]) for line in cells) for k in range(len(rows[0]))]
        for line in cells:
            padded = "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
            self.result(f"  {padded}".rstrip())
        if shown is not None and len(rows) > shown:
            self.result(f"  ... and {len(rows) - shown} more")

    def note(self, text: str) -> None:
        """Print a line on stderr, unless --quiet."""
        if not self.quiet and not self.muted:
            print(printable(text), file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Print a line on stderr, if --verbose."""
        if self.verbose:
            print(redacted(printable(text)), file=sys.stderr, flush=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an exception into one line on stderr and an exit code.

        With --quiet, the log messages of libraries below errors are dropped.
        """
        disabled = logging.root.manager.disable
        try:
            with warnings.catch_warnings():
                warnings.showwarning = self._show_warning
                if self.quiet:
                    logging.disable(logging.WARNING)
                yield
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # The reader is gone: nothing more can be written, nor flushed at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (Exception, KeyboardInterrupt) as error:
            if self.debug:
                import traceback

                print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)
            text, code = explained(error)
            self.failure(text, code)
            raise typer.Exit(code) from None
        finally:
            logging.disable(disabled)

    def failure(self, text: str, code: int) -> None:
        """Report an error that ends the command with an exit code."""
        text = redacted(text)
        self.event("error", code=code, message=text)
        print(f"sampler: {printable(text)}", file=sys.stderr, flush=True)

    def _show_warning(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.event("warning", message=str(message))
        self.note(f"sampler: warning: {' '.join(str(message).split())}")

    @contextmanager
    def progress(self, total: int) -> Iterator[Meter]:
        """Count images: a bar with ETA on a terminal, else one line per 10 seconds."""
        with self._bar(total) as bar:
            meter = Meter(total, self, bar)
            yield meter
            meter.finish()

    @contextmanager
    def updates(self, total: int) -> Iterator[Callable[[Record], None]]:
        """Show the records of a fine-tuning run of `total` updates.

        On a terminal: a bar with the reward and the time left, and above it a line for each
        evaluation and each skipped update. Elsewhere a line for each record.
        """
        with self._bar(total) as bar:
            yield Updates(total, self, bar).show

    @contextmanager
    def _bar(self, total: int) -> Iterator[Progress | None]:
        if self.quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            bar.add_task("", total=total)
            yield bar


def _cell(value: Any) -> str:
    """Text of a cell; floats with four digits, at least those before the point."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value)


def explained(error: BaseException) -> tuple[str, int]:
    """One sentence about an error, and its exit code."""
    from sampler.core.errors import SamplerError

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


def redacted(text: str) -> str:
    """Text with the values of secret keys and the credentials in URLs replaced by ***."""
    return _IN_URL.sub(r"\1***@", _SECRET.sub(r"\1***", text))


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    ending = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"


def printable(text: str) -> str:
    """Text with control characters replaced by ?, so that it cannot control a terminal."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "?" for c in text)
