"""The training loop of the bundled model: budget, schedule, EMA, exact checkpoints, progress."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scripts.bundled.checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Plan:
    """One stage's optimiser settings and budget: ``images`` seen, or ``minutes`` of training."""

    lr: float
    images: int | None = None
    minutes: float | None = None
    batch_size: int = 32
    weight_decay: float = 1e-3
    warmup: int = 100
    hold: float = 0.0
    floor: float = 0.02
    cosine: bool = True
    ema: float = 0.999
    checkpoint_steps: int = 500

    @property
    def steps(self) -> int | None:
        """Number of steps of an image budget; None under a time budget."""
        return None if self.images is None else max(1, self.images // self.batch_size)

    def fraction(self, step: int, seconds: float) -> float:
        """Return the spent part of the budget, 0 to 1, before ``step``."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, seconds / (60 * (self.minutes or 1.0)))

    def rate(self, step: int, fraction: float) -> float:
        """Return the learning rate: warm-up, hold, then cosine or linear decay to the floor."""
        left = max(0.0, fraction - self.hold) / (1 - self.hold)
        shape = 0.5 * (1 + math.cos(math.pi * left)) if self.cosine else 1 - left
        return (
            self.lr * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * shape)
        )


class Task(Protocol):
    """One training stage: its modules, the loss of step i, and preview images."""

    modules: nn.ModuleDict

    def loss(self, step: int) -> Tensor:
        """Return the scalar loss of batch ``step``; random only through (seed, step)."""
        ...

    def pictures(self, modules: nn.ModuleDict) -> Tensor | None:
        """Return images [N, 3, H, W] in [0, 1] made with the averaged modules, or None."""
        ...


def averaged(modules: nn.ModuleDict, decay: float) -> AveragedModel:
    """Return the EMA of the modules, with decay min(decay, (1 + n) / (10 + n)) at update n."""

    @torch.no_grad()
    def update(means: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        n = float(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for mean, value in zip(means, values, strict=True):
            # Counters (BatchNorm's number of batches) have no average.
            mean.lerp_(value, weight) if mean.is_floating_point() else mean.copy_(value)

    return AveragedModel(modules, multi_avg_fn=update, use_buffers=True)  # pyright: ignore[reportArgumentType]


def _rewind(path: Path, step: int) -> None:
    """Drop the log lines that a killed run wrote after its last checkpoint, the last one cut."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] < step]
        path.write_text("".join(line + "\n" for line in kept))


def save_pictures(images: Tensor | None, path: Path) -> None:
    """Write images [N, 3, H, W] in [0, 1] as one PNG, 16 to a row."""
    if images is None:
        return
    columns = min(16, len(images))
    sheet = images[: len(images) // columns * columns].float().clamp(0, 1)
    sheet = sheet.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((sheet * 255).round().byte().cpu().numpy()).save(path)


def train(
    task: Task, plan: Plan, folder: Path, after_step: Callable[[int], None] | None = None
) -> nn.ModuleDict:
    """Train until the budget is spent, resuming the folder's checkpoint; return the EMA modules."""
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        task.modules.parameters(), plan.lr, (0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    ema = averaged(task.modules, plan.ema)
    state = load_checkpoint(folder, task.modules, ema, optimizer)
    log_path = folder / "log.jsonl"
    _rewind(log_path, int(state["step"]))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeRemainingColumn()) as progress,
        log_path.open("a", buffering=1) as log,
    ):
        bar = progress.add_task(folder.name, total=plan.images)
        step, seconds = int(state["step"]), state["seconds"]
        while (fraction := plan.fraction(step, seconds)) < 1:
            began = time.monotonic()
            rate = plan.rate(step, fraction)
            loss = _advance(task, optimizer, ema, rate, step)
            seconds += time.monotonic() - began
            entry = {"step": step, "loss": loss, "lr": rate, "seconds": round(seconds, 3)}
            log.write(json.dumps(entry) + "\n")
            step += 1
            seen = step * plan.batch_size
            total = plan.images or round(seen / max(plan.fraction(step, seconds), 1e-6))
            progress.update(bar, completed=seen, total=total, description=f"loss {loss:.4f}")
            if step % plan.checkpoint_steps == 0 or plan.fraction(step, seconds) >= 1:
                state = {"step": step, "seconds": seconds}
                save_checkpoint(folder, task.modules, ema, optimizer, state)
                save_pictures(task.pictures(_averages(ema)), folder / f"grid-{step:08d}.png")
            if after_step is not None:
                after_step(step)
    return _averages(ema)


def _averages(ema: AveragedModel) -> nn.ModuleDict:
    modules = ema.module.eval()
    assert isinstance(modules, nn.ModuleDict)
    return modules


def _advance(
    task: Task, optimizer: torch.optim.Optimizer, ema: AveragedModel, rate: float, step: int
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    task.modules.train()
    loss = task.loss(step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(task.modules.parameters(), 1.0)
    optimizer.step()
    ema.update_parameters(task.modules)
    return float(loss.detach())
