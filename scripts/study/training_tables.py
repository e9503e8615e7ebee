"""Tables of the training studies: gains with their intervals, and what else has changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]
Check = tuple[str, bool | None, str]
VENDI, FRECHET = "vendi(bundled classifier)", "frechet(bundled classifier)"
Z = 1.959964  # half the width of a 95 % interval in standard errors


class Found:
    """The lines of one cell at one budget, of all its seeds."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, first = rows, rows[0]
        self.study, self.name, self.reward = (first[k] for k in ("study", "cell", "reward"))
        self.budget = str(first["budget"])
        self.seeds = sorted({r["seed"] for r in rows if isinstance(r["seed"], int)})
        self.together = max((str(r["seed"]) for r in rows), key=len)

    def of(self, scorer: str, seed: int | None = None, sampler: str = "ddim") -> Row:
        """The line of a scorer; of all seeds together unless one is given."""
        wanted = self.together if seed is None else str(seed)
        return next(
            r
            for r in self.rows
            if (r["scorer"], str(r["seed"]), r["sampler"]) == (scorer, wanted, sampler)
        )

    def log(self, name: str) -> list[float]:
        """A column of the training's log, mean of the last quarter of the updates, by seed."""
        return [r["mean"] for r in self.rows if r["scorer"] == f"log {name}"]

    def spent(self, column: str) -> float:
        """Mean of a cost over the seeds."""
        found = {r["seed"]: r[column] for r in self.rows if isinstance(r["seed"], int)}
        return sum(found.values()) / len(found)

    @property
    def gain(self) -> float:
        return self.of(self.reward)["difference"]

    @property
    def error(self) -> float:
        """Standard error of the gain, from the width of its interval."""
        row = self.of(self.reward)
        return (row["difference_high"] - row["difference_low"]) / (2 * Z)

    @property
    def errors(self) -> float:
        """The gain in standard errors."""
        return self.gain / self.error if self.error else math.inf


def cells(rows: Sequence[Row], study: str) -> list[Found]:
    """The cells of a study in the order of the file."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["study"] == study:
            found.setdefault((row["cell"], row["reward"], row["budget"]), []).append(row)
    return [Found(own) for own in found.values()]


def gains(found: Sequence[Found], sampler: str = "ddim") -> list[str]:
    """A table of what was gained, and at what cost."""
    lines = [
        "| trainer | budget | gain, each seed | gain, together (95 %) | shown | images | NFE | "
        "CPU s | wall s |",
        "|---" * 9 + "|",
    ]
    for one in found:
        every = ", ".join(f"{one.of(one.reward, s, sampler)['difference']:+.3f}" for s in one.seeds)
        row = one.of(one.reward, sampler=sampler)
        cost = " | ".join(f"{one.spent(k):.0f}" for k in ("made", "nfe", "cpu_seconds", "seconds"))
        lines.append(
            f"| {one.name} | {one.budget} | {every} | {change(row)} | {row['verdict']} | {cost} |"
        )
    return lines


def effects(found: Sequence[Found]) -> list[str]:
    """A table of what the reward did not ask for."""
    lines = [
        "| trainer | budget | judge, before → after | background | Vendi | saturation | Fréchet | "
        "drift |",
        "|---" * 8 + "|",
    ]
    for one in found:
        judge, frechet = one.of("judge.concept"), one.of(FRECHET)
        lines.append(
            f"| {one.name} | {one.budget} | {judge['other']:.3f} → {judge['mean']:.3f}, "
            f"{change(judge)} | {change(one.of('judge.background'))} | {change(one.of(VENDI))} | "
            f"{change(one.of('saturation'))} | {frechet['other']:.1f} → {frechet['mean']:.1f} | "
            f"{one.of('drift')['mean']:.4f} |"
        )
    return lines


def change(row: Row) -> str:
    """A paired difference and its interval."""
    low, high = row["difference_low"], row["difference_high"]
    return f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


def answers(checks: Sequence[Check]) -> list[str]:
    """A table of what was asked for and what was seen; None: too few seeds to tell."""
    lines = ["| asked | held | seen |", "|---|---|---|"]
    told = {True: "yes", False: "**no**", None: "open"}
    return lines + [f"| {asked} | {told[held]} | {seen} |" for asked, held, seen in checks]


def both(found: Sequence[Found]) -> Iterator[str]:
    """Both tables."""
    yield from gains(found)
    yield ""
    yield from effects(found)
