"""The cells of the training studies: which there are, in which order they run, and their lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sampler import bundled

SEEDS, TRAINED, STEPS, BATCH = (0, 1, 2), 16, 8, 32
IMAGES, CPU_SECONDS, PAIRS = 512, 60, "pairs"
REWARDS = ("classifier", "soft_compressibility", "colour_agreement")
FIT: dict[str, Any] = {
    "steps": STEPS, "guidance": "none", "batch": BATCH, "rank": 4, "alpha": 4, "lr": 1e-3,
    "checkpoint_every": 8, "mixed_precision": "bf16",
}  # fmt: skip
DDIM: dict[str, Any] = {"name": "ddim"}  # of evaluations: Euler steps on a flow


Key = tuple[str, ...]  # study, cell, reward and budget of a cell


@dataclass(frozen=True)
class Cell:
    """One setting of a study at one budget.

    fit: settings beside FIT. images: budget; seconds: budget of CPU seconds instead, which goes on
    with the run of `images`. ways: samplers of the evaluation, by name. wrong: share of wrong
    votes. until: share of an evaluation's steps that have the LoRA; of: name of the cell whose
    training this one evaluates.
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
    until: float | None = None
    of: str = ""
    model: str = bundled.BUNDLED_FLOW

    @property
    def budget(self) -> str:
        return f"{self.images} images" if self.seconds is None else f"{self.seconds} CPU s"

    @property
    def key(self) -> Key:
        """Return what tells this cell's lines from those of others."""
        return self.study, self.name, self.score, self.budget

    @property
    def score(self) -> str:
        """Return the name of the reward, or of the scorer that votes."""
        return "classifier" if self.reward == VOTES else str(self.reward)

    def folder(self, out: Path, seed: int) -> Path:
        """Return the run folder of a seed, the same for all budgets."""
        return out / f"{self.study}-{self.of or self.name}-{self.score}-{seed}".replace(" ", "_")

    def file(self, out: Path, seed: int) -> Path:
        """Return the file of this cell's lines."""
        name = self.budget if self.until is None else f"{self.budget} until {self.until:g}"
        return self.folder(out, seed) / f"{name.replace(' ', '_')}.json"


NFT = {"name": "nft", "group_size": 8, "times": 4, "memory": "on_policy"}
AWM = {"name": "awm", "group_size": 8, "times": 4, "average": "levels", "high": 1.0, "kl_ema": 0.0}
DDPO = {"name": "ddpo"}
GRPO = {"name": "grpo", "group_size": 8, "ratio": "guard", "window": {"size": 2, "every": 4}}
ALIGNPROP = {"name": "alignprop", "truncation": "fixed", "k": 1}
SRPO = {"name": "srpo", "positive": [], "negative": [], "inversion": False, "threshold": None}
DPO = {"name": "dpo", "data": PAIRS, "times": 4}
RATIOS = ("plain", "guard", "dppo")
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
    """S3: the three ratios of `grpo`, off policy; a short run at three times the learning rate."""
    ratios = {ratio: {**GRPO, "ratio": ratio, "minibatches": 4} for ratio in RATIOS}
    for ratio, trainer in ratios.items():
        fit = {"lr": 3 * RATES["grpo"]}
        yield Cell("S3", f"{ratio} 3x", trainer, fit=fit, images=IMAGES // 4, seeds=(0,))
    for images in (IMAGES // 4, IMAGES // 2, IMAGES):
        for ratio, trainer in ratios.items():
            yield Cell("S3", ratio, trainer, fit={"lr": RATES["grpo"]}, images=images)


def _long() -> Iterator[Cell]:
    """S4: over-optimisation, plain, with more KL to the base model, and with an average."""
    for name, kl, ema in (("plain", 0.0, 0.0), ("kl 0.1", 0.1, 0.0), ("ema 0.9", 0.0, 0.9)):
        fit = {"lr": RATES["nft"], "ema": ema}
        yield Cell("S4", name, {**NFT, "kl": kl}, fit=fit, images=2048)
    fit = {"lr": RATES["nft"], "ema": 0.0}
    yield Cell(
        "S4", "until 0.5", {**NFT, "kl": 0.0}, fit=fit, images=2048, until=0.5, of="plain"
    )  # fmt: skip


def _direct() -> Iterator[Cell]:
    """S9: `srpo` and `alignprop` through one step, of equal CPU seconds."""
    for cell in _cells("S9", SRPO, ALIGNPROP):
        yield replace(cell, seconds=CPU_SECONDS)


S1 = _cells("S1", NFT, DDPO, GRPO, ALIGNPROP, AWM)
GROUPS = {**DDPO, "advantage": "group", "group_size": 8}  # as nft, awm and grpo have them
S1 += (replace(S1[1], name="ddpo groups", trainer=GROUPS),)
CPS = replace(  # what `grpo` is with a plain ratio and without a window
    S1[-1], name="ddpo groups cps", fit={**S1[-1].fit, "sampler": "cps"}
)


def _choosing() -> Iterator[Cell]:
    """Choice of images (D3S) and of prompts (VADE) for `ddpo` in groups of 8."""
    for name, choice in (("ddpo spread", {"select": "spread"}), ("ddpo vade", {"prompts": "vade"})):
        trainer = {**GROUPS, **choice}
        yield Cell("choice", name, trainer, fit={"lr": RATES["ddpo"]}, images=IMAGES // 2)


# In the order of their value; all cells of a block have their first seed before the second.
BLOCKS: tuple[tuple[Cell, ...], ...] = (
    tuple(_trials()),
    tuple(replace(cell, images=IMAGES // 2) for cell in S1),
    tuple(_votes()),
    tuple(_choosing()),
    S1,
    tuple(_pairs()),
    tuple(_direct()),
    tuple(_samplers()),
    *(tuple(replace(cell, reward=reward) for cell in S1) for reward in REWARDS[1:]),
    tuple(_ratios()),
    (CPS,),
    *(
        tuple(replace(cell, reward=reward, seconds=CPU_SECONDS) for cell in S1)
        for reward in reversed(REWARDS)
    ),
    tuple(_long()),
    # Last: a budget goes on with the run of the one before.
    (replace(S1[1], images=8 * IMAGES, seeds=(0,)),),
)
CELLS = tuple(cell for block in BLOCKS for cell in block)


def queue() -> Iterator[tuple[int, int]]:
    """Yield the number of a cell and a seed, in the order in which they run."""
    first = 0
    for block in BLOCKS:
        for seed in sorted({seed for cell in block for seed in cell.seeds}):
            for number, cell in enumerate(block, first):
                if seed in cell.seeds:
                    yield number, seed
        first += len(block)


def complete(rows: Sequence[Mapping[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """The rows of the cells that have all their seeds, by cell."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["study"], row["cell"], row["reward"], row["budget"]), []).append(
            {**row}
        )
    seeds = {cell.key: set(cell.seeds) for cell in CELLS}
    return {key: own for key, own in found.items() if seeds[key] <= {row["seed"] for row in own}}


def lines_of(kept: Mapping[Key, list[dict[str, Any]]], out: Path) -> list[dict[str, Any]]:
    """The rows of all cells that are done, in the order in which cells run."""
    lines, told = list[dict[str, Any]](), set[Key]()
    for number, seed in queue():
        one = CELLS[number]
        if one.key in kept and one.key not in told:
            lines += kept[one.key]
        elif one.key not in kept and one.file(out, seed).is_file():
            lines += json.loads(one.file(out, seed).read_text(encoding="utf-8"))
        told.add(one.key)
    return [
        {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines
    ]
