"""One update: micro-batch losses, gradients over all processes, clipped optimiser steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sampler.core.errors import SamplerError
from sampler.training.base import MicroBatchLoss, TrainerBase
from sampler.training.batches import Batch, derived
from sampler.training.session import Session, Trainable

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFinite(SamplerError):
    """A loss or gradient that is NaN or infinite; the optimiser has not stepped with it."""


@dataclass
class Optimiser:
    """AdamW over the trained weights; `stepped`: whether the current update has changed them.

    Every process holds all parameters; gradients are summed over processes once per step, so
    all take the same step.
    """

    trainable: Trainable
    adam: torch.optim.AdamW
    clip: float
    accelerator: Accelerator
    stepped: bool = False

    def of(self, prefix: str) -> list[torch.nn.Parameter]:
        """Return the parameters whose names start with a prefix."""
        return [p for name, p in self.trainable.parameters.items() if name.startswith(prefix)]

    def step(self, prefix: str = "", factor: float = 1.0) -> float:
        """Step the parameters of a prefix; return their gradient norm before clipping.

        factor: of the learning rate. All gradients are cleared afterwards. Raises NonFinite.
        """
        parameters = self.of(prefix)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.accelerator.num_processes > 1:
            flat: Any = torch.cat([g.flatten() for g in grads])
            flat = self.accelerator.reduce(flat, "sum")
            pieces = flat.split([g.numel() for g in grads])
            grads = [piece.view_as(g) for piece, g in zip(pieces, grads, strict=True)]
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))
        if not math.isfinite(norm):
            raise NonFinite("The gradient is not finite.")
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad * scale if scale < 1 else grad
        self.stepped = True
        rates = [group["lr"] for group in self.adam.param_groups]
        for group, rate in zip(self.adam.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        self.adam.step()
        for group, rate in zip(self.adam.param_groups, rates, strict=True):
            group["lr"] = rate
        self.adam.zero_grad()
        return norm


def run_update(
    trainer: TrainerBase,
    session: Session,
    batch: Batch,
    state: Any,
    optimiser: Optimiser,
    precision: str,
) -> tuple[dict[str, Any], Any]:
    """Perform one update; return its metrics and the trainer's next state.

    Raises NonFinite, NonFiniteScore.
    """
    device = session.pipeline.device
    optimiser.stepped = False
    optimiser.adam.zero_grad()
    loss, norms = 0.0, []
    samples: dict[str, list[Tensor]] = defaultdict(list)
    numbers: dict[str, float] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived(batch.seed, batch.update, "network"))
        for part in _under_autocast(trainer.updates(session, batch, state), device.type, precision):
            if part.loss is not None:
                # only of what the optimiser steps: a reward's own weights collect no gradient
                part.loss.backward(inputs=optimiser.of(part.prefix))
                loss += float(part.loss.detach())
            for key, value in part.metrics.items():
                if isinstance(value, Tensor):
                    samples[key].append(value)
                else:
                    numbers[key] = value
            state = state if part.state is None else part.state
            if part.step:
                norms.append(optimiser.step(part.prefix, part.lr))
    total = session.gather(torch.tensor([loss], dtype=torch.float64)).sum()
    metrics = {"loss": float(total), "grad_norm": max(norms, default=0.0), **numbers}
    for key, values in samples.items():
        every = session.gather(torch.cat(values).float())
        metrics[key] = float(every.mean())
        metrics[f"{key}_std"] = float(every.std()) if len(every) > 1 else 0.0
    squares = [p.detach().square().sum() for p in optimiser.trainable.parameters.values()]
    metrics["adapter_norm"] = float(torch.stack(squares).sum().sqrt())
    return metrics, state


def _under_autocast(
    losses: Iterator[MicroBatchLoss], device: str, precision: str
) -> Iterator[MicroBatchLoss]:
    """Compute each micro-batch loss under autocast, but neither its backward pass nor the step."""
    while True:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            part = next(losses, None)
        if part is None:
            return
        yield part
