"""What a command tells: results on stdout, everything for humans on stderr, errors as one line."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

# `token=...`, "secret": "...", --password ..., HF_API_KEY=...; a lone "key" is an image's here.
_SECRET = re.compile(
    r"((?:[\w-]*(?:token|secret|password)|[\w-]+[_-]key)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&}]+",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(\w://)[^/\s@]+@")
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
            print("\n".join(map(printable, text.split("\n"))), flush=True)

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
            print(redacted(printable(text)), file=sys.stderr, flush=True)

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

                print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)
            text, code = explained(error)
            text = redacted(text)
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

        columns = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            bar.add_task("", total=total)
            yield Meter(total, self, bar)


class Meter:
    """Images done and failed, of how many, since when; writer threads tell it."""

    def __init__(self, total: int, report: Report, bar: Progress | None = None) -> None:
        self.total, self.report, self.bar = total, report, bar
        self.done = self.failed = self.skipped = self.rows = 0
        self.started = self.told = time.monotonic()
        self._lock = threading.Lock()

    def skip(self, count: int) -> None:
        """So many images were there already; the clock starts now."""
        self.skipped = count
        self.started = time.monotonic()
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], count)

    def lines(self, where: str) -> Callable[[Sequence[Mapping[str, Any]]], None]:
        """What hears of journal lines: results and events for each, and progress."""

        def told(lines: Sequence[Mapping[str, Any]]) -> None:
            with self._lock:
                for line in lines:
                    self._line(line, where)
                self._progress(len(lines))

        return told

    def _line(self, line: Mapping[str, Any], where: str) -> None:
        facts: dict[str, Any] = dict(line)
        if line["status"] == "ok":
            self.done += 1
            self.rows += line["nfe"]
            facts["file"] = f"{where}/{line['file']}"
            self.report.result(facts["file"])
        else:
            self.failed += line["status"] == "error"
            error = line["error"]
            self.report.note(f"sampler: image {line['index']}: {error['code']}: {error['message']}")
        self.report.event("item", **facts)
        for warning in line.get("warnings", ()):
            self.report.note(f"sampler: image {line['index']}: {warning}")

    def _progress(self, count: int) -> None:
        now = time.monotonic()
        made = self.done + self.failed
        rate = made / max(now - self.started, 1e-9)
        rows = self.rows / max(self.done, 1)
        text = f"{rate:.2f} images/s, {rows:.1f} rows per image, {self.failed} failed"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=count, description=text)
        elif now - self.told >= PLAIN_EVERY:
            self.told = now
            left = (self.total - self.skipped - made) / rate
            reached = made + self.skipped
            there = f", {self.skipped} were there" if self.skipped else ""
            self.report.note(f"{reached} of {self.total} images{there}, {text}, {left:.0f} s left")
            counts = {"done": self.done, "failed": self.failed, "skipped": self.skipped}
            self.report.event("progress", **counts, total=self.total, rate=round(rate, 3))


def explained(error: BaseException) -> tuple[str, int]:
    """An error as one sentence and the exit code it stands for."""
    from sampler.errors import SamplerError

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
    """Text without what follows a key that names a secret, nor what stands before @ in a URL."""
    return _IN_URL.sub(r"\1***@", _SECRET.sub(r"\1***", text))


def counted(number: int, thing: str) -> str:
    """ "1 image", "2 images"."""
    ending = "es" if thing.endswith("ch") else "s"
    return f"{number} {thing}{'' if number == 1 else ending}"


def printable(text: str) -> str:
    """Text without control characters, so that it cannot steer a terminal."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "?" for c in text)
