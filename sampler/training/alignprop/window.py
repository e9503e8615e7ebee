"""A run of which only a window of final steps is differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from sampler_kernels import settle
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sampler.core.loop import apply_move
from sampler.core.noise import Noise
from sampler.types import Branch, Level, Lin, Prediction, Snapshot, Span, spans

if TYPE_CHECKING:
    from sampler.core.trajectory import Run
    from sampler.training.alignprop.trainer import AlignProp
    from sampler.training.batches import Batch
    from sampler.training.session import Session


@dataclass(frozen=True)
class Made:
    """images: one or more lists of B images; drift [B] to the base model; nfe: rows evaluated."""

    images: list[Tensor]
    drift: Tensor
    nfe: int


@dataclass(frozen=True)
class Cut:
    """A denoiser through which less gradient flows than through the one it asks.

    at "input": x is detached before the network sees it, and kept in the prediction's linear part;
    at "output": the network has no gradient at all.
    """

    denoiser: Any
    at: str

    @property
    def models(self) -> tuple[str, ...]:
        return getattr(self.denoiser, "models", ("main",))

    def __call__(
        self, x: Tensor, span: Span, branches: Mapping[str, Branch], nfe: list[int]
    ) -> dict[str, Prediction]:
        with torch.no_grad() if self.at == "output" else nullcontext():
            preds = self.denoiser(x.detach(), span, branches, nfe)
        return {name: replace(pred, x=Lin.of(x)) for name, pred in preds.items()}


def images_with_gradient(
    trainer: AlignProp, session: Session, batch: Batch, rows: Sequence[int], kept: list[bool]
) -> Made:
    """The images of some rows, with the gradient of the kept steps."""
    run = session.begin(batch, rows)
    if trainer.ending == "jump":
        first = kept.index(True)
        run = run._replace(levels=(*run.levels[: first + 1], run.levels[-1]))
        kept = [*kept[:first], True]
    snapshot, drift = walk(trainer, session, run, kept)
    x = settle(session.method.finish(snapshot.x, snapshot.sampler))
    images = [decoded(trainer, session, x)]
    for again in range(trainer.lv):
        renoised = _renoised(run, x, again)
        more, penalty = walk(trainer, session, run._replace(snapshot=renoised), kept)
        drift = drift + penalty
        final = settle(session.method.finish(more.x, more.sampler))
        images.append(decoded(trainer, session, final))
    return Made(images, drift / len(images), sum(snapshot.nfe) + trainer.lv * len(rows))


def walk(
    trainer: AlignProp, session: Session, run: Run, kept: Sequence[bool]
) -> tuple[Snapshot, Tensor]:
    """The last snapshot of a run, and its mean squared distance [B] to the base predictions."""
    engine, snapshot = session.engine, run.snapshot
    first, todo = kept.index(True), spans(run.levels)
    with torch.no_grad():
        for span in todo[snapshot.index : first]:
            snapshot, _ = _step(session, engine.denoiser, run, snapshot, span, False)
    drift = snapshot.x.new_zeros(len(snapshot.seeds))
    window = todo[max(first, snapshot.index) :]
    for span in window:
        cut = "" if trainer.through_input else "input"
        cut = cut if kept[span.index] else "output"
        denoiser = Cut(engine.denoiser, cut) if cut else engine.denoiser
        anchored = bool(trainer.anchor) and kept[span.index]
        arguments = (session, denoiser, run, snapshot, span, anchored)
        if trainer.checkpointing:
            snapshot, gap = _recomputed(*arguments)
        else:
            snapshot, gap = _step(*arguments)
        drift = drift + gap / len(window)
    return snapshot, drift


def _recomputed(*arguments: Any) -> tuple[Snapshot, Tensor]:
    answer: Any = checkpoint(_step, *arguments, use_reentrant=False)
    return answer


def _step(
    session: Session, denoiser: Any, run: Run, snapshot: Snapshot, span: Span, anchored: bool
) -> tuple[Snapshot, Tensor]:
    """One step; the noise is a function of seed and step, so recomputing draws the same."""
    engine = session.engine.with_denoiser(denoiser)
    pred, state, nfe = engine.predict(snapshot, span, run.cond, run.rule)
    gap = snapshot.x.new_zeros(len(snapshot.seeds))
    if anchored:
        with torch.no_grad(), session.reference():
            base = session.engine.predict(snapshot, span, run.cond, run.rule)[0].eps.tensor()
        gap = (pred.eps.tensor() - base).square().flatten(1).mean(1)
    move = session.method.step(snapshot.x, pred, span, snapshot.sampler)
    return apply_move(snapshot, move, state, nfe), gap


def _renoised(run: Run, x: Tensor, again: int) -> Snapshot:
    """x_0 brought back to the level of the last step."""
    index, level = len(run.levels) - 2, Level(*run.levels[-2])
    noise = Noise(run.snapshot.seeds).draw(1000 + again, x, "renoise")
    x = level.alpha * x.detach() + level.sigma * noise
    return run.snapshot._replace(index=index, x=x)


def decoded(trainer: AlignProp, session: Session, x: Tensor) -> Tensor:
    """Images [B, 3, H, W]; recomputed in the backward pass like the steps."""
    decode = session.decoder(trainer.clamp)
    pieces = x.split(1) if trainer.vae_slices else [x]
    if trainer.checkpointing:
        images: list[Any] = [checkpoint(decode, piece, use_reentrant=False) for piece in pieces]
    else:
        images = [decode(piece) for piece in pieces]
    return images[0] if len(images) == 1 else torch.cat(images)
