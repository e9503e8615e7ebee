"""Progress of runs: counts of images, and records of fine-tuning updates."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_SECONDS = 10.0  # between progress lines where stderr is not a terminal

Record = Mapping[str, Any]


class Reporter(Protocol):
    """Output of a command: results, events, and notes for people (`Report`)."""

    def result(self, text: str) -> None: ...
    def event(self, kind: str, /, **content: Any) -> None: ...
    def note(self, text: str) -> None: ...


class Meter:
    """Count of images done, failed, dropped and skipped; called from writer threads.

    skipped: existed before the run; dropped: generated, but not written.
    """

    def __init__(self, total: int, report: Reporter, bar: Progress | None = None) -> None:
        self.total, self.report, self.bar = total, report, bar
        self.done = self.failed = self.dropped = self.skipped = self.nfe = 0
        self.started = self.shown = time.monotonic()
        self._lock = threading.Lock()
        self._printed: int | None = None  # images generated when the last plain line was printed

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

    def finish(self) -> None:
        """Complete the plain progress lines, if there were any, so that none is out of date."""
        if self._printed not in (None, self._made()):
            self._print_line()

    def _line(self, line: Record, where: str) -> None:
        facts: dict[str, Any] = dict(line)
        if line["status"] == "ok":
            self.done += 1
            self.nfe += line["nfe"]
            facts["file"] = f"{where}/{line['file']}"
            self.report.result(facts["file"])
        else:
            self.failed += line["status"] == "error"
            self.dropped += line["status"] != "error"
            error = line["error"]
            self.report.note(f"sampler: image {line['index']}: {error['code']}: {error['message']}")
        self.report.event("item", **facts)
        for warning in line.get("warnings", ()):
            self.report.note(f"sampler: image {line['index']}: {warning}")

    def _progress(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=count, description=self._speed())
        elif time.monotonic() - self.shown >= PLAIN_SECONDS:
            self._print_line()

    def _made(self) -> int:
        return self.done + self.failed + self.dropped

    def _rate(self) -> float:
        """Images per second of this run; 0 while there is none."""
        return self._made() / max(time.monotonic() - self.started, 1e-9)

    def _speed(self) -> str:
        nfe = f"{self.nfe / self.done:.1f} evaluations per image, " if self.done else ""
        return f"{self._rate():.2f} images/s, {nfe}{self.failed} failed"

    def _print_line(self) -> None:
        """Print the counts, and the time left if it can be estimated."""
        made, rate = self._made(), self._rate()
        self.shown, self._printed = time.monotonic(), made
        existed = f", {self.skipped} existed" if self.skipped else ""
        waiting = self.total - self.skipped - made
        left = f", {waiting / rate:.0f} s left" if rate and waiting else ""
        self.report.note(
            f"{made + self.skipped} of {self.total} images{existed}, {self._speed()}{left}"
        )
        counts = {"done": self.done, "failed": self.failed, "skipped": self.skipped}
        self.report.event("progress", **counts, total=self.total, rate=round(rate, 3))


class Updates:
    """Progress of a fine-tuning run."""

    def __init__(self, total: int, report: Reporter, bar: Progress | None) -> None:
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
        text = f"reward {_figure(record['reward'])}" if "reward" in record else ""
        self.bar.update(task, completed=record["update"], description=text)


def update_line(record: Record, total: int) -> str:
    """One record of a fine-tuning run as a line."""
    where = f"{record['update']}/{total}"
    reward = f"reward {_figure(record['reward'])}, " if "reward" in record else ""
    if record["kind"] == "eval":
        return f"{where} evaluation: {reward}drift {_figure(record['drift'])}"
    if "skipped" in record:
        return f"{where} skipped: {record['skipped']}"
    return (
        f"{where} {reward}loss {_figure(record['loss'])}, "
        f"gradient {_figure(record['grad_norm'])}, {record['seconds']:.1f} s"
    )


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
