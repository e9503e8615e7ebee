"""One update: shares of losses backward, gradients over all processes, a clipped step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampler.errors import SamplerError
from sampler.training.base import Trained, TrainerBase
from sampler.training.batches import Batch, derived
from sampler.training.session import Session


class NonFinite(SamplerError):
    """A loss or gradient that is NaN or infinite; the optimiser has not stepped with it."""


@dataclass
class Optimiser:
    """AdamW over what is trained. `stepped`: whether the current update has changed weights.

    Every process holds all parameters; gradients are summed over processes once per step, so
    all take the same step.
    """

    adapter: Trained
    adam: torch.optim.AdamW
    clip: float
    accelerator: Any
    stepped: bool = False

    def step(self, group: str = "") -> float:
        """Steps a group and clears all gradients; returns their norm before clipping.

        Raises NonFinite.
        """
        named = self.adapter.parameters.items()
        parameters = [p for name, p in named if name.startswith(group)]
        for name, parameter in named:  # AdamW leaves alone what has no gradient
            parameter.grad = parameter.grad if name.startswith(group) else None
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in grads]), "sum")
            pieces = flat.split([g.numel() for g in grads])
            grads = [piece.view_as(g) for piece, g in zip(pieces, grads, strict=True)]
        norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))
        if not math.isfinite(norm):
            raise NonFinite("The gradient is not finite.")
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad * scale if scale < 1 else grad
        self.stepped = True
        self.adam.step()
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
    """(metrics of the update, the trainer's next state). Raises NonFinite, NonFiniteScore."""
    device = session.engine.pipeline.device
    optimiser.stepped = False
    optimiser.adam.zero_grad()
    loss, norms, rows, plain = 0.0, [], {}, {}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derived(batch.seed, batch.update, "network"))
        shares = trainer.updates(session, batch, state)
        while True:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                share = next(shares, None)
            if share is None:
                break
            if share.loss is not None:
                share.loss.backward()
                loss += float(share.loss.detach())
            for key, value in share.metrics.items():
                (rows.setdefault(key, []).append(value) if isinstance(value, Tensor) else None)
                plain.update({} if isinstance(value, Tensor) else {key: value})
            state = state if share.state is None else share.state
            if share.step:
                norms.append(optimiser.step(share.group))
    total = session.gather(torch.tensor([loss], dtype=torch.float64)).sum()
    metrics: dict[str, Any] = {"loss": float(total), "grad_norm": max(norms, default=0.0), **plain}
    for key, values in rows.items():
        every = session.gather(torch.cat(values).float())
        metrics[key] = float(every.mean())
        metrics[f"{key}_std"] = float(every.std()) if len(every) > 1 else 0.0
    squares = [p.detach().square().sum() for p in optimiser.adapter.parameters.values()]
    metrics["adapter_norm"] = float(torch.stack(squares).sum().sqrt())
    return metrics, state
