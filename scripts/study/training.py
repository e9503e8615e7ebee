"""Studies of the trainers on the bundled model as a flow, with paired intervals of `sampler eval`.

    python -m scripts.study.training run --out runs/training_study    # all cells; resumable
    python -m scripts.study.training page                             # docs/training_study.md

A cell is one training: a study, a setting, a reward, a budget; each seed of it runs in a process of
its own, as a run folder below --out, and its lines are in docs/figures/training_study.csv when it
ends. A budget of CPU seconds goes on with the run of 512 images. An evaluation has 32 captions, the
16 that are trained on and 16 others, 4 seeds each, in 8 deterministic steps, against the same
prompts and seeds of the model without LoRA. Lines with seed "0+1" have the images of both trainings
together. One thread, bfloat16 (autocast in training).
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sampler
from sampler import bundled
from sampler.core.errors import IncompleteError
from sampler.core.images import read as read_image
from sampler.evaluation.compare import rows_of
from sampler.evaluation.scoring import Scored
from sampler.models.lora import load_lora
from sampler.rewards.ballots import open_ballots, read_ballot, save_votes
from sampler.rewards.scoring import score
from scripts.study.finetune import captions, write

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS, TRAINED, REPEATS, STEPS, BATCH = (0, 1, 2), 16, 4, 8, 32
IMAGES, CPU_SECONDS, PAIRS = 512, 60, "pairs"
REWARDS = ("classifier", "soft_compressibility", "colour_agreement")
SCORERS = (*REWARDS, "judge", "vendi", "frechet")
FIT: dict[str, Any] = {
    "steps": STEPS, "guidance": "none", "batch": BATCH, "rank": 4, "alpha": 4, "lr": 1e-3,
    "mixed_precision": "bf16", "checkpoint_every": 8,
}  # fmt: skip
DDIM: dict[str, Any] = {"name": "ddim"}  # of evaluations: Euler steps on a flow
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


@dataclass(frozen=True)
class Cell:
    """One setting of a study at one budget.

    fit: settings beside FIT. images: budget; seconds: budget of CPU seconds instead, which goes on
    with the run of `images`. ways: samplers of the evaluation, by name. wrong: share of wrong
    votes.
    """

    study: str
    name: str
    trainer: Mapping[str, Any]
    reward: Any = "classifier"
    fit: Mapping[str, Any] = field(default_factory=dict[str, Any])
    images: int = IMAGES
    seconds: int | None = None
    ways: Mapping[str, Any] = field(default_factory=lambda: {"ddim": DDIM})
    seeds: tuple[int, ...] = SEEDS
    wrong: float = 0.0
    model: str = bundled.BUNDLED_FLOW

    @property
    def budget(self) -> str:
        return f"{self.images} images" if self.seconds is None else f"{self.seconds} CPU s"

    @property
    def score(self) -> str:
        """Return the name of the reward, or of the scorer that votes."""
        return "classifier" if self.reward == VOTES else str(self.reward)

    @property
    def settings(self) -> dict[str, Any]:
        return {**FIT, **self.fit}

    def folder(self, out: Path, seed: int) -> Path:
        """Return the run folder of a seed, the same for all budgets."""
        return out / f"{self.study}-{self.name}-{self.score}-{seed}".replace(" ", "_")

    def file(self, out: Path, seed: int) -> Path:
        """Return the file of this cell's lines."""
        return self.folder(out, seed) / f"{self.budget.replace(' ', '_')}.json"


NFT = {"name": "nft", "group_size": 8, "times": 4}
AWM = {"name": "awm", "group_size": 8, "times": 4}
GRPO = {"name": "grpo", "group_size": 8, "ratio": "guard", "window": {"size": 2, "every": 4}}
DDPO = {"name": "ddpo"}
ALIGNPROP = {"name": "alignprop", "truncation": "fixed", "k": 1}
DPO = {"name": "dpo", "data": PAIRS, "times": 4}
VOTES = {"name": "votes", "wait": False}
RATES = {"nft": 3e-3, "awm": 3e-3, "grpo": 3e-3, "ddpo": 3e-3, "dpo": 3e-3}  # of the trials


def _cells(study: str, *trainers: Mapping[str, Any], **more: Any) -> tuple[Cell, ...]:
    """One cell for each trainer, at its learning rate."""
    return tuple(
        Cell(study, t["name"], t, fit={"lr": RATES.get(t["name"], FIT["lr"])}, **more)
        for t in trainers
    )


def _trials() -> Iterator[Cell]:
    """Short trials of the learning rate, with a seed that no study has."""
    for trainer in (NFT, GRPO):
        name = f"{trainer['name']} 0.003"
        yield Cell("lr", name, trainer, fit={"lr": 3e-3}, images=192, seeds=(9,))


def _samplers() -> Iterator[Cell]:
    """S2: the same training with the noise of two samplers in all steps."""
    for name in ("cps", "flow_sde"):
        way = {"name": name, "noise_level": 0.7}
        yield Cell(
            "S2", name, {**GRPO, "window": None}, fit={"lr": RATES["grpo"], "sampler": way},
            images=256, ways={"ddim": DDIM, "training": way},
        )  # fmt: skip


def _pairs() -> Iterator[Cell]:
    """S5: pairs of images that the classifier has judged."""
    for anchor in (0.0, 0.1):
        yield Cell("S5", f"anchor {anchor:g}", {**DPO, "anchor": anchor}, fit={"lr": RATES["dpo"]})


def _votes() -> Iterator[Cell]:
    """S6: five rounds of votes on 16 images, right ones and with a tenth of them wrong."""
    for wrong in (0.1, 0.0):
        yield Cell(
            "S6", f"{wrong:.0%} wrong", {**NFT, "group_size": 4}, VOTES, wrong=wrong, images=80,
            fit={"lr": 5e-3, "batch": 16, "micro": 16},
        )  # fmt: skip


def _ratios() -> Iterator[Cell]:
    """S3: the three ratios of `grpo` at three times the learning rate, off policy."""
    for ratio in ("plain", "guard", "dppo"):
        trainer = {**GRPO, "ratio": ratio, "minibatches": 4}
        yield Cell("S3", ratio, trainer, fit={"lr": 3 * RATES["grpo"]})


def _long() -> Iterator[Cell]:
    """S4: over-optimisation, plain, with more KL to the base model, and with an average."""
    for name, kl, ema in (("plain", 0.0, 0.0), ("kl 0.1", 0.1, 0.0), ("ema 0.9", 0.0, 0.9)):
        fit = {"lr": RATES["nft"], "ema": ema}
        yield Cell("S4", name, {**NFT, "kl": kl}, fit=fit, images=2048)


S1 = _cells("S1", NFT, DDPO, GRPO, ALIGNPROP, AWM)
GROUPS = {**DDPO, "advantage": "group", "group_size": 8}  # as nft, awm and grpo have them
S1 += (replace(S1[1], name="ddpo groups", trainer=GROUPS),)


def _choosing() -> Iterator[Cell]:
    """Choice of images (D3S) and of prompts (VADE) for `ddpo` in groups of 8."""
    for name, choice in (("ddpo spread", {"select": "spread"}), ("ddpo vade", {"prompts": "vade"})):
        trainer = {**GROUPS, **choice}
        yield Cell("choice", name, trainer, fit={"lr": RATES["ddpo"]}, images=IMAGES // 2)


# In the order of their value; all cells of a block have their first seed before the second.
BLOCKS: tuple[tuple[Cell, ...], ...] = (
    tuple(_trials()),
    tuple(replace(cell, images=IMAGES // 2) for cell in S1[:3]),
    tuple(replace(cell, images=IMAGES // 2) for cell in S1[3:]),
    tuple(_votes()),
    tuple(_choosing()),
    S1,
    tuple(_samplers()),
    tuple(_pairs()),
    tuple(replace(cell, seconds=CPU_SECONDS) for cell in S1),
    *(tuple(replace(cell, reward=reward) for cell in S1) for reward in REWARDS[1:]),
    tuple(_ratios()),
    tuple(_long()),
    (replace(S1[1], images=8 * IMAGES, seeds=(0,)),),
)
CELLS = tuple(cell for block in BLOCKS for cell in block)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")],
    docs: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS,
) -> None:
    """Run the cells that are missing, in order, each in a process of its own."""
    for number, seed in _queue():
        one = CELLS[number]
        if not one.file(out, seed).is_file():
            call = [sys.executable, "-m", "scripts.study.training", "cell", str(number), str(seed)]
            if subprocess.run([*call, "--out", str(out)], check=False).returncode:
                print(f"{one.file(out, seed)} failed", flush=True)
        write(docs / "figures" / "training_study.csv", COLUMNS, _found(out))


def _queue() -> Iterator[tuple[int, int]]:
    first = 0
    for block in BLOCKS:
        for seed in sorted({seed for cell in block for seed in cell.seeds}):
            for number, cell in enumerate(block, first):
                if seed in cell.seeds:
                    yield number, seed
        first += len(block)


def _found(out: Path) -> list[dict[str, Any]]:
    """The lines of all cells that are done."""
    files = [CELLS[number].file(out, seed) for number, seed in _queue()]
    return [
        {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()}
        for file in files
        if file.is_file()
        for line in json.loads(file.read_text(encoding="utf-8"))
    ]


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
        base = _scored(own.model, None, out / "base" / f"{own.model}-{how['name']}", how)
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
    engine, settings = sampler.load(own.model, dtype="float32"), {**own.settings, "seed": seed}
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
    from scripts.study.training_page import write_page

    write_page(docs)


@cache
def texts() -> tuple[str, ...]:
    """The captions of evaluations, 16 that are trained on and 16 others."""
    every = captions(4 * TRAINED)
    return tuple(every[::4] + every[2::4])


def _of_seed(own: Cell, out: Path, seed: int, name: str, how: Mapping[str, Any]) -> Scored:
    folder = own.folder(out, seed)
    return _scored(own.model, folder, folder / f"{own.budget}-{name}".replace(" ", "_"), how)


def _scored(model: str, lora: Path | None, folder: Path, how: Mapping[str, Any]) -> Scored:
    """Scores of the images of a model, which are made unless they are there."""
    if not (folder / "eval.json").is_file():
        engine = sampler.load(model, dtype="bfloat16")
        if lora is not None:
            load_lora(engine, lora)
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
        {
            k: {p: mean(lambda one, k=k, p=p: one.prompts[k][p]) for p in values}
            for k, values in first.prompts.items()
        },
        {k: mean(lambda one, k=k: one.sets[k]) for k in first.sets},
    )


if __name__ == "__main__":
    app()
