"""CPU time of the updates of nft and awm beside a plain training step of the same samples.

    OMP_NUM_THREADS=1 python -m scripts.bench.matching

By turns on the bundled model: the losses of a trainer at one level with their backward pass, and
noise, one forward pass, the mean squared error and its backward pass. On policy, without a
distance to the base model; collecting images is left out of both. --figures gets a line per
trainer in finetune_bench.csv, the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sampler_kernels import settle

import sampler
from sampler.core.noise import Noise
from sampler.models.trainable_lora import adapted, default_targets
from sampler.training.averages import Average, Averaged
from sampler.training.batches import Batch, batch
from sampler.training.matching.update import Matching, predict_at
from sampler.training.online import Collected, sampled
from sampler.training.session import Session
from scripts.bench.finetune import record

ROWS, STEPS = 8, 4


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    engine = sampler.load()
    network = engine.pipeline.network
    with adapted(network, 32, 64, default_targets(network), 0) as adapter:
        trained = Averaged(adapter, {"old": Average.of(adapter.parameters)})
        session = Session(
            engine, sampler.build("reward", "brightness"), sampler.build("sampler", "ab"),
            sampler.build("guidance", "none"), STEPS, (64, 64), ROWS, trainable=trained,
        )  # fmt: skip
        rows = batch(["a dog", "a cat"], ROWS, 0, 0, ROWS)
        with torch.no_grad():
            collected = sampled(session, rows, rows.rows)
        for name in ("nft", "awm"):
            found = ratio(session, rows, collected, name, options.rounds)
            record(options.figures, [(f"update beside a plain step: {name}", found, "ratio")])


def ratio(session: Session, rows: Batch, collected: Collected, name: str, rounds: int) -> float:
    """Return the median of the ratios of CPU times, ours over plain, of neighbouring rounds."""
    fields = {"name": name, "group_size": ROWS, "times": 1, "kl": 0.0}
    fields |= {"kl_ema": 0.0} if name == "awm" else {}
    matching = Matching(sampler.build("trainer", fields), session)
    weights = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    level = session.pipeline.grid(STEPS, session.size)[1]

    def ours() -> Iterator[torch.Tensor]:
        for loss, _ in matching.losses(rows, collected, weights):
            yield loss.mean()

    def plain() -> Iterator[torch.Tensor]:
        x0 = collected.x0
        seeds = collected.run.snapshot.seeds
        eps = Noise(seeds).draw(0, x0, "renoise")
        x = level.alpha * x0 + level.sigma * eps
        pred = predict_at(session, collected.run.cond, seeds, x, level)
        yield (settle(pred.out) - eps).square().mean()

    found = []
    for number in range(rounds + 3):
        times = [spent(side, session) for side in (ours, plain)]
        if number >= 3:
            found.append(times[0] / times[1])
    return statistics.median(found)


def spent(losses: Callable[[], Iterator[torch.Tensor]], session: Session) -> float:
    """Return the CPU seconds of the losses and their backward passes."""
    parameters: list[Any] = list(session.trainable.parameters.values())
    start = time.process_time()
    for loss in losses():
        loss.backward(inputs=parameters)
    used = time.process_time() - start
    for parameter in parameters:
        parameter.grad = None
    return used


if __name__ == "__main__":
    main()
