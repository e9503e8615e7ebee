"""How `sampler finetune` tells what is going on: a bar on a terminal, else a line per update."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sampler.cli.report import Report

Told = Callable[[dict[str, Any]], None]


@contextmanager
def progress(report: Report, total: int) -> Iterator[Told]:
    """What hears of the records of a run of `total` updates.

    On a terminal: a bar with the reward and the time that is left, and above it a line for each
    evaluation and each skipped update. Elsewhere a line for each record.
    """
    if report.quiet or not sys.stderr.isatty():
        yield _lines(report, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        met: list[int] = []

        def told(record: dict[str, Any]) -> None:
            report.event("progress", **record)
            if record["kind"] == "eval" or "skipped" in record:
                bar.console.print(line(record, total), markup=False, highlight=False)
            if record["kind"] == "eval":
                return
            if not met:  # a run that is gone on with: its earlier updates took no time now
                met.append(record["update"])
                bar.reset(task, total=total, completed=record["update"] - 1)
            words = f"reward {record['reward']:.4g}" if "reward" in record else ""
            bar.update(task, completed=record["update"], description=words)

        yield told


def _lines(report: Report, total: int) -> Told:
    def told(record: dict[str, Any]) -> None:
        report.event("progress", **record)
        report.note(line(record, total))

    return told


def line(record: dict[str, Any], total: int) -> str:
    """One line of progress."""
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
