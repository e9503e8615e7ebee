"""Output of commands: results on stdout, messages for people on stderr, errors in one line."""

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

# `token=...`, "secret": "...", --password ..., HF_API_KEY=...; a lone "key" is that of an image.
_SECRET = re.compile(
    r"((?:[\w-]*(?:token|secret|password)|[\w-]+[_-]key)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&}]+",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(\w://)[^/\s@]+@")
PLAIN_SECONDS = 10.0  # between progress lines where stderr is not a terminal

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Output streams of one command. as_json: stdout is JSON Lines events, not plain results."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False

    def result(self, text: str) -> None:
        """Print a result, unless stdout is for events."""
        if not self.as_json:
            print("\n".join(map(printable, text.split("\n"))), flush=True)

    def event(self, kind: str, /, **content: Any) -> None:
        """Print the event {"v": 1, "t": kind, "time": unix seconds, ...}, if --json was given."""
        if self.as_json:
            line = {"v": 1, "t": kind, "time": round(time.time(), 3), **content}
            print(json.dumps(line, ensure_ascii=False, allow_nan=False), flush=True)

    def note(self, text: str) -> None:
        """Print a line on stderr, unless --quiet."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Print a line on stderr, if --verbose."""
        if self.verbose:
            print(redacted(printable(text)), file=sys.stderr, flush=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an exception into one line on stderr and an exit code."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = self._show_warning
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
            yield Meter(total, self, bar)

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


class Meter:
    """Count of images done, failed and skipped; called from writer threads."""

    def __init__(self, total: int, report: Report, bar: Progress | None = None) -> None:
        self.total, self.report, self.bar = total, report, bar
        self.done = self.failed = self.skipped = self.rows = 0
        self.started = self.shown = time.monotonic()
        self._lock = threading.Lock()

    def skip(self, count: int) -> None:
        """Count images that existed before the run; the clock starts now."""
        self.skipped = count
        self.started = time.monotonic()
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], count)

    def lines(self, where: str) -> Callable[[Sequence[Record]], None]:
        """Callback for journal lines of the run at `where`: a result and an event for each."""

        def show(lines: Sequence[Record]) -> None:
            with self._lock:
                for line in lines:
                    self._line(line, where)
                self._progress(len(lines))

        return show

    def _line(self, line: Record, where: str) -> None:
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
        elif now - self.shown >= PLAIN_SECONDS:
            self.shown = now
            left = (self.total - self.skipped - made) / rate
            reached = made + self.skipped
            there = f", {self.skipped} were there" if self.skipped else ""
            self.report.note(f"{reached} of {self.total} images{there}, {text}, {left:.0f} s left")
            counts = {"done": self.done, "failed": self.failed, "skipped": self.skipped}
            self.report.event("progress", **counts, total=self.total, rate=round(rate, 3))


class Updates:
    """Progress of a fine-tuning run."""

    def __init__(self, total: int, report: Report, bar: Progress | None) -> None:
        self.total, self.report, self.bar = total, report, bar
        self._started = False

    def show(self, record: Record) -> None:
        """Show one record of the training log."""
        self.report.event("progress", **record)
        if self.bar is None:
            self.report.note(update_line(record, self.total))
            return
        if record["kind"] == "eval" or "skipped" in record:
            self.bar.console.print(update_line(record, self.total), markup=False, highlight=False)
        if record["kind"] == "eval":
            return
        task = self.bar.task_ids[0]
        if not self._started:  # updates before a resumption took no time in this process
            self._started = True
            self.bar.reset(task, total=self.total, completed=record["update"] - 1)
        text = f"reward {record['reward']:.4g}" if "reward" in record else ""
        self.bar.update(task, completed=record["update"], description=text)


def update_line(record: Record, total: int) -> str:
    """One record of a fine-tuning run as a line."""
    where = f"{record['update']}/{total}"
    reward = f"reward {record['reward']:.4g}, " if "reward" in record else ""
    if record["kind"] == "eval":
        return f"{where} evaluation: {reward}drift {record['drift']:.3g}"
    if "skipped" in record:
        return f"{where} skipped: {record['skipped']}"
    return (
        f"{where} {reward}loss {record['loss']:.4g}, gradient {record['grad_norm']:.3g}, "
        f"{record['seconds']:.1f} s"
    )


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
