"""The page of the training studies: a template, and tables of docs/figures/training_study.csv."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.study.guidance_document import read

Row = dict[str, Any]
Check = tuple[str, bool | None, str]
VENDI, FRECHET = "vendi(bundled classifier)", "frechet(bundled classifier)"
SEEDS, Z = 3, 1.959964  # half the width of a 95 % interval in standard errors


def write_page(docs: Path) -> None:
    """Write docs/training_study.md."""
    rows = read(docs / "figures" / "training_study.csv")
    head = Path(__file__).with_name("training_study.md").read_text(encoding="utf-8")
    parts = (_trials, _first, _samplers, _pairs, _votes, _choosing, _missing)
    text = "\n".join([head, *(line for part in parts for line in part(rows))])
    (docs / "training_study.md").write_text(text, encoding="utf-8")


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


def _trials(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "lr")):
        return
    yield "\n## Learning rate\n"
    yield "Short trials with a seed that no study has, on `classifier`.\n"
    yield from gains(found)


def _first(rows: Sequence[Row]) -> Iterator[str]:
    every = cells(rows, "S1")
    for reward in dict.fromkeys(one.reward for one in every):
        found = [one for one in every if one.reward == reward]
        yield f"\n## S1: the trainers on `{reward}`\n"
        yield from gains(found)
        yield ""
        yield from effects(found)
        if checks := [*_asked(found)]:
            yield ""
            yield from answers(checks)
        yield from _of_ddpo(found)


def _of_ddpo(found: Sequence[Found]) -> Iterator[str]:
    """Sentence on whether `ddpo` lacks the groups of the others."""
    for budget in dict.fromkeys(one.budget for one in found):
        pair = {one.name: one for one in found if one.budget == budget}
        if not {"ddpo", "ddpo groups", "grpo"} <= set(pair):
            continue
        groups = pair["ddpo groups"]
        cause = "not shown to help" if groups.errors <= 3 else "what helps"
        yield (
            f"\nGroups of 8 are {cause} `ddpo` within {budget}: with them it gains "
            f"{groups.errors:.1f} standard errors, by\ndefault {pair['ddpo'].errors:.1f}, `grpo` "
            f"{pair['grpo'].errors:.1f}. `grpo` also trains 2 steps of 8 instead of all, and its "
            "sampler draws\nless noise (`cps` at 0.7, not `ddim` with eta = 1)."
        )


def _asked(found: Sequence[Found]) -> Iterator[Check]:
    """nft against ddpo at each budget that both have."""
    for budget in dict.fromkeys(one.budget for one in found):
        pair = {one.name: one for one in found if one.budget == budget}
        nft, ddpo = pair.get("nft"), pair.get("ddpo")
        if nft is None or ddpo is None:
            continue
        whole = len(nft.seeds) == len(ddpo.seeds) == SEEDS
        yield (
            f"{budget}: `nft` gains more than 3 standard errors, `ddpo` does not",
            nft.errors > 3 >= ddpo.errors if whole else None,
            f"nft {nft.errors:.1f}, ddpo {ddpo.errors:.1f} standard errors, "
            f"seeds: {len(nft.seeds)} and {len(ddpo.seeds)} of {SEEDS}",
        )
        mine, other = (one.gain / one.spent("cpu_seconds") for one in (nft, ddpo))
        yield (
            f"{budget}: `nft` gains twice as much per CPU second as `ddpo`",
            mine > 0 and mine >= 2 * other if whole else None,
            f"{1000 * mine:.2f} and {1000 * other:.2f} thousandths per CPU second",
        )


def _samplers(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "S2")):
        return
    yield "\n## S2: the noise of `flow_sde` and of `cps`\n"
    yield (
        "`grpo` with noise of level 0.7 in all 8 steps. The gap is the reward of the images that "
        "the training\nsees less that of deterministic images of the same weights.\n"
    )
    yield from gains(found)
    yield ""
    yield "| sampler | model | images of the training | deterministic | gap |"
    yield "|---" * 5 + "|"
    gap = {}
    for one in found:
        own, plain = one.of(one.reward, sampler="training"), one.of(one.reward)
        for when, key in (("without LoRA", "other"), ("trained", "mean")):
            gap[one.name, when] = own[key] - plain[key]
            yield (
                f"| {one.name} | {when} | {own[key]:.3f} | {plain[key]:.3f} | "
                f"{own[key] - plain[key]:+.3f} |"
            )
    if len(found) == 2:
        yield ""
        sde, cps = (abs(gap[name, "trained"]) for name in ("flow_sde", "cps"))
        seen = f"{gap['flow_sde', 'trained']:+.3f} and {gap['cps', 'trained']:+.3f}"
        yield from answers([("the gap of `flow_sde` vanishes with `cps`", cps < sde / 4, seen)])


def _pairs(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "S5")):
        return
    yield "\n## S5: `dpo` from 256 pairs that the classifier judged\n"
    yield from gains(found)
    yield ""
    yield from effects(found)
    yield ""
    yield "| setting | pairs in the right order | margin of the chosen | margin of the rejected |"
    yield "|---" * 4 + "|"
    for one in found:
        cell = [", ".join(f"{v:.2f}" for v in one.log("accuracy"))]
        cell += [
            ", ".join(f"{v:+.4f}" for v in one.log(f"margin_{which}"))
            for which in ("chosen", "rejected")
        ]
        yield f"| {one.name} | {' | '.join(cell)} |"
    yield "\nThe last quarter of the updates, each seed; margins above 0: better than without LoRA."


def _votes(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "S6")):
        return
    yield "\n## S6: votes\n"
    yield (
        "Five rounds of 16 images (4 captions, 4 images each) with `nft`. The voter is the "
        "classifier: 1 for\nthe better half of a caption's images, a tenth of the votes wrong, or "
        "none.\n"
    )
    yield from gains(found)
    yield ""
    yield from effects(found)


def _choosing(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "choice")):
        return
    yield "\n## Choice of images and prompts\n"
    yield "`ddpo` in groups of 8: on all images of prompts in order, on those of a group with the"
    yield "most varied advantages (`select: spread`), and on prompts that are neither easy nor hard"
    yield "(`prompts: vade`). The budget counts the images that are generated.\n"
    plain = [
        one
        for one in cells(rows, "S1")
        if (one.name, one.budget) == ("ddpo groups", found[0].budget)
    ]
    yield from gains([*plain, *found])
    yield ""
    yield from effects([*plain, *found])


def _missing(rows: Sequence[Row]) -> Iterator[str]:
    """Cells that were planned and not run."""
    from scripts.study.training import CELLS

    done = {(r["study"], r["cell"], r["reward"], str(r["budget"])): set[int]() for r in rows}
    for r in rows:
        if isinstance(r["seed"], int):
            done[r["study"], r["cell"], r["reward"], str(r["budget"])].add(r["seed"])
    left = [
        (cell, len(done.get((cell.study, cell.name, cell.score, cell.budget), ())))
        for cell in CELLS
    ]
    short = [(cell, n) for cell, n in left if n < len(cell.seeds)]
    if short:
        yield "\n## What has not been run\n"
        yield "The command goes on with these:\n"
        groups: dict[str, list[str]] = {}
        for cell, n in short:
            key = f"{cell.study}, `{cell.score}`, {cell.budget}"
            groups.setdefault(key, []).append(
                cell.name + (f" ({n} of {len(cell.seeds)} seeds)" if n else "")
            )
        yield from (f"- {key}: {', '.join(names)}" for key, names in groups.items())
    yield ""
