"""Studies of the trainers on the bundled model as a flow, with paired intervals of `sampler eval`.

    python -m scripts.study.training run --out runs/training_study    # all cells; resumable
    python -m scripts.study.training page                             # docs/training_study.md

A cell is one training: a study, a setting, a reward, a budget; each seed of it runs in a process of
its own, as a run folder below --out, and its lines are in docs/figures/training_study.csv when it
ends. A budget of CPU seconds goes on with the run of 512 images. An evaluation has 32 captions, the
16 that are trained on and 16 others, 4 seeds each, in 8 deterministic steps, against the same
prompts and seeds of the model without LoRA. Lines with seed "0+1" have the images of both trainings
together. One thread; bfloat16, by autocast in training.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sampler
from sampler.core.errors import IncompleteError
from sampler.core.images import read as read_image
from sampler.evaluation.compare import rows_of
from sampler.evaluation.scoring import Scored
from sampler.models.lora import load_lora
from sampler.rewards.ballots import open_ballots, read_ballot, save_votes
from sampler.rewards.scoring import score
from scripts.study.finetune import captions, write
from scripts.study.guidance_document import read
from scripts.study.training_cells import (
    BATCH,
    CELLS,
    DDIM,
    FIT,
    PAIRS,
    REWARDS,
    STEPS,
    TRAINED,
    Cell,
    complete,
    lines_of,
    queue,
)
from scripts.study.training_page import write_page

DOCS = Path(__file__).resolve().parents[2] / "docs"
REPEATS = 4
SCORERS = (*REWARDS, "judge", "vendi", "frechet")
LOGGED = (
    "reward", "ratio_first", "ratio", "gain", "kl", "accuracy", "margin_chosen", "margin_rejected",
    "flat_groups",
)  # fmt: skip
COLUMNS = (
    "study", "cell", "reward", "seed", "budget", "sampler", "made", "nfe", "cpu_seconds", "seconds",
    "scorer", "mean", "low", "high", "prompts", "images", "other", "difference", "difference_low",
    "difference_high", "wins", "ties", "losses", "verdict",
)  # fmt: skip
app = typer.Typer(add_completion=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")],
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
) -> None:
    """Run the cells that the table lacks, in order, each in a process of its own."""
    table = docs / "figures" / "training_study.csv"
    kept = complete(read(table)) if table.is_file() else {}
    for number, seed in queue():
        one = CELLS[number]
        if one.key not in kept and not one.file(out, seed).is_file():
            call = [sys.executable, "-m", "scripts.study.training", "cell", str(number), str(seed)]
            if subprocess.run([*call, "--out", str(out)], check=False).returncode:
                print(f"{one.file(out, seed)} failed", flush=True)
        write(table, COLUMNS, lines_of(kept, out))


@app.command()
def cell(
    number: int, seed: int, out: Annotated[Path, typer.Option(help="Folder of run folders.")]
) -> None:
    """Train and evaluate one cell; its lines are in a file of its run folder."""
    torch.set_num_threads(1)
    own = CELLS[number]
    rows, log = list[dict[str, Any]](), _trained(own, seed, own.folder(out, seed))
    head = {"study": own.study, "cell": own.name, "reward": own.score, "budget": own.budget}
    line = {**head, "seed": seed, "made": log[-1]["images"], "nfe": log[-1]["nfe"]}
    line |= {k: sum(entry[k] for entry in log) for k in ("cpu_seconds", "seconds")}
    seeds = [s for s in own.seeds if s <= seed]
    whole = {**head, "seed": "+".join(map(str, seeds))} if len(seeds) > 1 else None
    for name, how in own.ways.items():
        folder = out / "base" / f"{own.model}-{how['name']}"
        base = _scored(own.model, None, folder, how)
        every = [_of_seed(own, out, s, name, how) for s in seeds]
        rows += [{**line, "sampler": name, **row.plain()} for row in rows_of(every[-1], base)]
        if whole:
            together = rows_of(_together(every), base)
            rows += [{**whole, "sampler": name, **row.plain()} for row in together]
    end = log[-max(1, len(log) // 4) :]  # the last quarter
    for name in (k for k in LOGGED if k in end[-1]):
        mean = sum(entry[name] for entry in end) / len(end)
        rows.append({**line, "scorer": f"log {name}", "mean": mean})
    own.file(out, seed).write_text(json.dumps(rows), encoding="utf-8")
    told = next(row for row in rows if row["scorer"] == own.score)
    print(own.study, own.name, seed, told["difference"], line["cpu_seconds"], flush=True)


def _trained(own: Cell, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train to the budget, and return the records of its updates."""
    engine, settings = sampler.load(own.model, dtype="float32"), {**FIT, **own.fit, "seed": seed}
    trainer, given = dict(own.trainer), (own.reward, captions(TRAINED))
    if trainer.get("data") == PAIRS:
        trainer["data"], given = str(_judged_pairs(engine, folder.parent / PAIRS)), (None, ())

    def updates(count: int) -> list[dict[str, Any]]:
        while True:
            try:
                report = sampler.finetune(engine, trainer, *given, folder, count, settings=settings)
                return [line for line in report.log if line["kind"] == "update"]
            except IncompleteError:
                if not (waiting := open_ballots(folder)):
                    raise
                _vote(waiting[0], seed, own.wrong)

    log = updates(own.images // settings["batch"])
    if own.seconds is None:
        return log
    mean = sum(line["cpu_seconds"] for line in log) / len(log)
    return updates(round(own.seconds / mean))


def _judged_pairs(engine: Any, folder: Path) -> Path:
    """256 pairs of the untrained model's images, 16 of each caption, ordered by the classifier."""
    table, prompts = folder / "metadata.jsonl", captions(TRAINED)
    if table.is_file():
        return folder
    asked = [text for text in prompts for _ in range(2 * TRAINED)]
    engine.generate(
        asked, seeds=10_000, steps=STEPS, sampler=DDIM, guidance="none", batch_size=BATCH,
        out=folder / "run",
    )  # fmt: skip
    scored = sampler.evaluate(folder / "run", ["classifier"]).scored
    rows = [*zip(scored.source.pictures, scored.images["classifier"], strict=True)]
    with table.open("w", encoding="utf-8") as file:
        for pair in zip(rows[::2], rows[1::2], strict=True):
            (better, _), (worse, _) = sorted(pair, key=lambda row: -row[1])
            names = {"chosen": f"run/{better.name}", "rejected": f"run/{worse.name}"}
            file.write(json.dumps({"prompt": better.prompt, **names}) + "\n")
    return folder


@torch.no_grad()
def _vote(ballot: Path, seed: int, wrong: float) -> None:
    """Vote as the classifier: 1 for the better half of each prompt's images, some of them wrong."""
    images = read_ballot(ballot)["images"]
    prompts = [entry["prompt"] for entry in images]
    pixels = torch.cat([read_image(ballot / entry["file"]) for entry in images])
    scores = score(sampler.build("reward", "classifier"), pixels, prompts).tolist()
    draw, votes = random.Random(f"{seed} {ballot.name}"), list[dict[str, int]]()
    for entry, own in zip(images, scores, strict=True):
        group = [s for s, text in zip(scores, prompts, strict=True) if text == entry["prompt"]]
        vote = (own > statistics.median(group)) != (draw.random() < wrong)
        votes.append({"row": entry["row"], "vote": int(vote)})
    save_votes(ballot, votes)


@app.command()
def page(docs: Annotated[Path, typer.Option(help="Folder of the pages.")] = DOCS) -> None:
    """Write docs/training_study.md from the table."""
    write_page(docs)


@cache
def texts() -> tuple[str, ...]:
    """The captions of evaluations, 16 that are trained on and 16 others."""
    every = captions(4 * TRAINED)
    return tuple(every[::4] + every[2::4])


def _of_seed(own: Cell, out: Path, seed: int, name: str, how: Mapping[str, Any]) -> Scored:
    folder = own.folder(out, seed)
    images = folder / f"{own.file(out, seed).stem}-{name}"
    return _scored(own.model, folder, images, how, own.until)


def _scored(
    model: str, lora: Path | None, folder: Path, how: Mapping[str, Any], until: float | None = None
) -> Scored:  # fmt: skip
    """Scores of the images of a model, which are made unless they are there."""
    if not (folder / "eval.json").is_file():
        engine = sampler.load(model, dtype="bfloat16")
        if lora is not None:
            load_lora(engine, lora, until=until)
        engine.generate(
            [text for text in texts() for _ in range(REPEATS)], seeds=0, steps=STEPS,
            sampler=dict(how), guidance="none", batch_size=BATCH, out=folder,
        )  # fmt: skip
    return sampler.evaluate(folder, list(SCORERS)).scored


def _together(every: Sequence[Scored]) -> Scored:
    """The images of several runs as one set; measures of prompts and of sets are averaged."""

    def mean(of: Callable[[Scored], Any]) -> float:
        return sum(float(of(one)) for one in every) / len(every)

    first = every[0]
    source = replace(first.source, pictures=tuple(p for one in every for p in one.source.pictures))
    return Scored(
        source,
        {k: [v for one in every for v in one.images[k]] for k in first.images},
        prompts={
            k: {p: mean(lambda one, k=k, p=p: one.prompts[k][p]) for p in values}
            for k, values in first.prompts.items()
        },
        sets={k: mean(lambda one, k=k: one.sets[k]) for k in first.sets},
    )


if __name__ == "__main__":
    app()
