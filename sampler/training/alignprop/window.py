"""Sampling with gradients in a window of final steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from sampler_kernels import settle
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sampler.core.noise import Noise, with_noise
from sampler.core.step import apply_move
from sampler.core.trajectory import Run
from sampler.training.batches import Batch
from sampler.training.session import Session
from sampler.types import Branch, Denoiser, Level, Lin, Prediction, Snapshot, Span, spans


@dataclass(frozen=True)
class WindowImages:
    """Images of a window, with drift and cost.

    images: one or more tensors [B, 3, H, W]; drift [B]: mean squared distance to the base model's
    predictions; nfe: network evaluations, of all samples together.
    """

    images: list[Tensor]
    drift: Tensor
    nfe: int


@dataclass(frozen=True)
class GradientCut:
    """A denoiser with less gradient than the one that it wraps.

    at: "input" detaches x before the network and keeps it in the linear part of the prediction;
        "output" removes the gradient of the network altogether.
    """

    denoiser: Denoiser
    at: Literal["input", "output"]

    @property
    def models(self) -> tuple[str, ...]:
        return getattr(self.denoiser, "models", ("main",))

    def __call__(
        self, x: Tensor, span: Span, branches: Mapping[str, Branch], nfe: list[int]
    ) -> dict[str, Prediction]:
        with torch.no_grad() if self.at == "output" else nullcontext():
            preds = self.denoiser(x.detach(), span, branches, nfe)
        return {name: replace(pred, x=Lin.of(x)) for name, pred in preds.items()}


@dataclass(frozen=True)
class GradientWindow:
    """Sampling with gradient in the steps where `kept` is True; other fields as in `AlignProp`.

    A run of fewer steps than its grid has ends with a jump: the last of them goes to x_0.
    """

    session: Session
    kept: Sequence[bool]
    through_input: bool = True
    lv: int = 0
    anchor: float = 0.0
    checkpointing: bool = True
    vae_slices: bool = False
    clamp: Literal["hard", "straight_through"] = "hard"

    def sample(self, batch: Batch, rows: Sequence[int]) -> WindowImages:
        """Sample some images of a batch, with the gradient of the kept steps."""
        run = self.session.begin(batch, rows)
        run = run._replace(levels=(*run.levels[: len(self.kept)], run.levels[-1]))
        snapshot, drift = self.walk(run)
        finish = self.session.method.finish
        x = settle(finish(snapshot.x, snapshot.sampler))
        images = [self.decode(x)]
        for number in range(self.lv):
            last, penalty = self.walk(run._replace(snapshot=_renoised(run, x, number)))
            drift = drift + penalty
            images.append(self.decode(settle(finish(last.x, last.sampler))))
        nfe = sum(snapshot.nfe) + self.lv * len(rows)
        return WindowImages(images, drift / len(images), nfe)

    def walk(self, run: Run) -> tuple[Snapshot, Tensor]:
        """Return the last snapshot of a run, and its drift [B] in the window (`WindowImages`)."""
        denoiser, snapshot = self.session.engine.denoiser, run.snapshot
        first, steps = self.kept.index(True), spans(run.levels)
        with torch.no_grad():
            for span in steps[snapshot.index : first]:
                snapshot, _ = self._step(denoiser, run, snapshot, span, False)
        drift = snapshot.x.new_zeros(len(snapshot.seeds))
        window = steps[max(first, snapshot.index) :]
        for span in window:
            kept, partial = self.kept[span.index], denoiser
            if not kept or not self.through_input:
                partial = GradientCut(denoiser, "input" if kept else "output")
            arguments = (partial, run, snapshot, span, kept and self.anchor > 0)
            step: Any = self._recomputed if self.checkpointing else self._step
            snapshot, distance = step(*arguments)
            drift = drift + distance / len(window)
        return snapshot, drift

    def decode(self, x: Tensor) -> Tensor:
        """Decode latents to images [B, 3, H, W], recomputed in the backward pass like the steps."""
        decode = self.session.decoder(self.clamp)
        images: list[Any] = [
            checkpoint(decode, piece, use_reentrant=False) if self.checkpointing else decode(piece)
            for piece in (x.split(1) if self.vae_slices else [x])
        ]
        return images[0] if len(images) == 1 else torch.cat(images)

    def _recomputed(self, *arguments: Any) -> Any:
        return checkpoint(self._step, *arguments, use_reentrant=False)

    def _step(
        self, denoiser: Denoiser, run: Run, snapshot: Snapshot, span: Span, anchored: bool
    ) -> tuple[Snapshot, Tensor]:
        """One step; its noise is a function of seed and step, so recomputation draws the same."""
        session, engine = self.session, self.session.engine.with_denoiser(denoiser)
        pred, state, nfe = engine.predict(snapshot, span, run.cond, run.rule)
        distance = snapshot.x.new_zeros(len(snapshot.seeds))
        if anchored:
            with torch.no_grad(), session.reference():
                base, _, _ = session.engine.predict(snapshot, span, run.cond, run.rule)
            distance = (pred.eps.tensor() - base.eps.tensor()).square().flatten(1).mean(1)
        span = with_noise(span, session.method, snapshot.seeds)
        move = session.method.step(snapshot.x, pred, span, snapshot.sampler)
        return apply_move(snapshot, move, state, nfe), distance


def _renoised(run: Run, x: Tensor, number: int) -> Snapshot:
    """Return x_0 noised to the level of the last step."""
    index, level = len(run.levels) - 2, Level(*run.levels[-2])
    noise = Noise(run.snapshot.seeds).draw(1000 + number, x, "renoise")
    x = level.alpha * x.detach() + level.sigma * noise
    return run.snapshot._replace(index=index, x=x)
