"""Cost of an f-distill student: per image against the guided teacher, per update against its parts.

    python -m scripts.bench.f_distill --csv docs/figures/f_distill_cost.csv

CPU seconds, medians of interleaved rounds on the bundled model, float32. The student has the
teacher's shape, so an untrained one costs what a trained one does. The parts of a student's update:
the student's forward and backward pass, another such pass in the place of the one through the
teacher that the adversarial term needs, and the guided teacher's forward pass.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import sampler
from sampler import registry
from sampler.training.batches import batch
from sampler.training.optimise import Optimiser, run_update
from sampler.training.session import Session
from sampler.training.settings import settings_from
from scripts.bundled.networks import plain_attention

PROMPT = "a dog on a green background"
BATCH = 8
CFG = {"name": "cfg", "scale": 3.0}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = sampler.load()
    plain_attention(teacher.pipeline.network)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows += images(teacher, Path(folder), options.rounds)
        rows += updates(teacher, Path(folder) / "updates", options.rounds)
    for row in rows:
        print(f"{row['what']:<44} {1000 * row['seconds']:9.1f} ms")
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, Any]]:
    """The median CPU seconds of each call, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                taken[name].append(time.process_time() - started)
    return [
        {"what": name, "seconds": round(statistics.median(values), 6)}
        for name, values in taken.items()
    ]


def images(teacher: Any, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """One image, and a batch: prompt to pixels, text encoder and decoder included."""
    trainer = {"name": "f_distill", "divergence": "rkl", "gan_weight": 0.0}
    settings = {"guidance": CFG}
    made = sampler.finetune(teacher, trainer, None, [PROMPT], folder, 0, settings=settings)
    student = sampler.load(student=made.lora)

    def one(engine: Any, count: int, **options: Any) -> Callable[[], Any]:
        options |= {"seeds": 0, "batch_size": count, "output": "tensor"}
        return lambda: engine.generate([PROMPT] * count, **options)

    calls = {}
    for count in (1, BATCH):
        guided = {"steps": 20, "guidance": CFG, "sampler": "ddim"}
        calls[f"teacher, 20 steps of CFG, {count} images"] = one(teacher, count, **guided)
        calls[f"student, {count} images"] = one(student, count, steps=1)
    return medians(calls, rounds)


def updates(teacher: Any, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A student's update with and without the adversarial term, and its parts by themselves."""
    calls: dict[str, Callable[[], Any]] = {}
    spec = {"name": "f_distill", "samples": 1, "student_every": 1}
    method = registry.build("trainer", spec)
    settings = {"batch": BATCH, "guidance": CFG, "steps": 1, "sampler": "ddim"}
    chosen = settings_from(settings).resolved(method.defaults, teacher, [PROMPT])
    size = teacher.pipeline.size(None, None)
    session = Session(teacher, None, chosen.sampler, chosen.guidance, 1, size, BATCH)
    rows = batch([PROMPT], BATCH, 0, 0)
    with method.trainable(session, [PROMPT], folder, chosen) as made:
        session = replace(session, trainable=made)
        adam = torch.optim.AdamW(made.parameters.values(), lr=1e-6)
        optimiser = Optimiser(made, adam, 1.0, Accelerator(cpu=True))
        state = method.start()
        calls["update of the student"] = lambda: run_update(
            method, session, rows, state, optimiser, "no"
        )
        calls["its parts: two passes and the teacher"] = _parts(teacher, made, rows)
        return medians(calls, rounds)


def _parts(teacher: Any, made: Any, rows: Any) -> Callable[[], Any]:
    """Two forward and backward passes of the network, one guided forward pass of the teacher."""
    pipeline = teacher.pipeline
    with torch.no_grad():
        cond = pipeline.encode([PROMPT] * BATCH, [""] * BATCH, True, pipeline.size(None, None))
    x = torch.randn(BATCH, *pipeline.latent_shape(*pipeline.size(None, None)))
    level = pipeline.schedule.level(500)
    both = {k: torch.cat([v, cond.uncond[k]]) for k, v in cond.cond.items()}

    def call() -> None:
        for _ in range(2):
            made.networks.forward(x, level, cond.cond, "student").square().mean().backward()
        with torch.no_grad():
            pipeline.forward(torch.cat([x, x]), level, both, "main")
        for parameter in made.parameters.values():
            parameter.grad = None

    return call


if __name__ == "__main__":
    main()
