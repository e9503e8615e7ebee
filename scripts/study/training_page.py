"""The page of the training studies: a template, and tables of docs/figures/training_study.csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from scripts.study.guidance_document import read
from scripts.study.training_cells import CELLS, IMAGES, RATIOS
from scripts.study.training_tables import Check, Found, Row, answers, both, cells, gains

SEEDS = 3
SHORT = f"{IMAGES // 2} images"  # half of the plan's budget, in the table only


def write_page(docs: Path) -> None:
    """Write docs/training_study.md."""
    rows = read(docs / "figures" / "training_study.csv")
    head = Path(__file__).with_name("training_study.md").read_text(encoding="utf-8")
    parts = (
        _trials, _first, _noise, _samplers, _ratios, _long, _pairs, _votes, _direct, _choosing,
        _missing,
    )  # fmt: skip
    table = docs / "figures" / "gradient_noise.csv"
    noise = read(table) if table.is_file() else []
    lines = [line for part in parts for line in (part(rows) if part != _noise else part(noise))]
    text = "\n".join([head, *lines])
    (docs / "training_study.md").write_text(text, encoding="utf-8")


def _trials(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "lr")):
        return
    yield "\n## Learning rate\n"
    yield "Short trials with a seed that no study has, on `classifier`.\n"
    yield from gains(found)


def _first(rows: Sequence[Row]) -> Iterator[str]:
    every = [one for one in cells(rows, "S1") if one.budget != SHORT]
    for reward in dict.fromkeys(one.reward for one in every):
        found = [one for one in every if one.reward == reward]
        yield f"\n## S1: the trainers on `{reward}`\n"
        yield from both(found)
        if checks := [*_asked(found)]:
            yield ""
            yield from answers(checks)
        yield from _of_ddpo(found)


def _noise(rows: Sequence[Row]) -> Iterator[str]:
    """Section on the number of images that a gradient needs."""
    if not rows:
        return
    size, batches = rows[0]["images"], rows[0]["batches"]
    yield "\n## How many images a gradient needs\n"
    yield (
        f"The gradients of {batches} batches of {size} images on `classifier`, all at the weights "
        f"without LoRA. The cosine of two\nis 1 / (1 + N/{size}), where N is the number of images "
        "at which signal and noise are of equal length.\n"
        "(`python -m scripts.study.gradient_noise run`, [table](figures/gradient_noise.csv))\n"
    )
    yield "| trainer | cosine of two batches (least to most) | N | of all batches with `nft`'s |"
    yield "|---" * 4 + "|"
    for row in rows:
        cosine, low, high = (row[k] for k in ("cosine", "low", "high"))
        yield (
            f"| {row['trainer']} | {cosine:.3f} ({low:.3f} to {high:.3f}) | "
            f"{size * (1 / cosine - 1):,.0f} | {row['with_nft']:.2f} |"
        )
    ddpo = next(row for row in rows if row["trainer"] == "ddpo")
    yield (
        "\n`nft`, `awm`, `grpo` and `alignprop` agree on a direction. That of `ddpo` is not seen "
        f"in {size * batches:,} images: by\nthe highest of its cosines it needs batches of "
        f"{size * (1 / ddpo['high'] - 1):,.0f} images, not of 32, and further batches of 32 take "
        "it\nwhere noise does (S1, 4096 images). So there is no converged reward of `ddpo` here to "
        "compare with."
    )


def _of_ddpo(found: Sequence[Found]) -> Iterator[str]:
    """Sentences on what `ddpo` lacks of `grpo`: groups, the sampler, or the ratio."""
    for budget in dict.fromkeys(one.budget for one in found):
        pair = {one.name: one for one in found if one.budget == budget}
        if not {"ddpo", "ddpo groups", "grpo"} <= set(pair):
            continue
        known = [
            ("by default", pair["ddpo"]),
            ("with groups of 8", pair["ddpo groups"]),
            ("with these and `cps`", pair.get("ddpo groups cps")),
        ]
        seen = ", ".join(f"{one.errors:.1f} {how}" for how, one in known if one is not None)
        yield (
            f"\nStandard errors that `ddpo` gains within {budget}: {seen}; `grpo` "
            f"{pair['grpo'].errors:.1f}."
        )
        if "ddpo groups cps" in pair:
            yield (
                "The last of these is `grpo` with a plain ratio in all steps. `guard` in all steps "
                "(S2) and a plain\nratio in a window (S3) do gain. A score function is divided by "
                "the noise of its step, so that in\na plain sum steps of little noise weigh most; "
                "that this is the cause has not been measured."
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
        "the training\nsees minus that of deterministic images of the same weights.\n"
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


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "S3")):
        return
    yield "\n## S3: the ratios of `grpo`\n"
    yield (
        "With four optimiser steps per batch of images; *3x* at three times the learning rate, at "
        "which all of them lose.\n"
    )
    yield from both(found)
    yield from _at_one_reward([one for one in found if one.name in RATIOS])


def _at_one_reward(found: Sequence[Found]) -> Iterator[str]:
    """The judge where all ratios have gained as much reward, between two budgets."""
    names = dict.fromkeys(one.name for one in found)
    runs = {name: [one for one in found if one.name == name] for name in names}
    level = min(max(one.gain for one in own) for own in runs.values())
    yield f"\nThe judge where the reward has gained {level:+.3f}, the most that all reach, on a"
    yield "line between two budgets:\n"
    yield "| ratio | images | judge |"
    yield "|---|---|---|"
    for name, own in runs.items():
        before = (0.0, 0.0, own[0].of("judge.concept")["other"])
        for one in own:
            after = (one.gain, one.spent("made"), one.of("judge.concept")["mean"])
            if one.gain >= level:
                share = (level - before[0]) / (after[0] - before[0])
                images, judge = (
                    a + share * (b - a) for a, b in zip(before[1:], after[1:], strict=True)
                )
                yield f"| {name} | {images:.0f} | {judge:.3f} |"
                break
            before = after


def _long(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "S4")):
        return
    yield "\n## S4: over-optimisation\n"
    yield (
        "`nft` for four times the images of S1: as it is, with a KL penalty to the model without "
        "LoRA, with a\nrunning average of the weights, and the first training's LoRA in the first "
        "half of the steps only\n(`until: 0.5`).\n"
    )
    yield from both(found)


def _direct(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "S9")):
        return
    yield "\n## S9: direct gradients\n"
    yield (
        "`srpo` without control words (the classifier does not read them) and `alignprop` through "
        "the last step,\nof equal CPU seconds.\n"
    )
    yield from both(found)


def _pairs(rows: Sequence[Row]) -> Iterator[str]:
    if not (found := cells(rows, "S5")):
        return
    yield "\n## S5: `dpo` from 256 pairs that the classifier judged\n"
    yield from both(found)
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
    yield from both(found)


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
    yield from both([*plain, *found])


def _missing(rows: Sequence[Row]) -> Iterator[str]:
    """Cells that were planned and not run."""
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
