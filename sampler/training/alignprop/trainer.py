"""AlignProp: the gradient of the reward through the last K steps of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import DocInfo, Ge, Gt, Lt

from sampler.registry import register
from sampler.registry.constraints import Count, Positive
from sampler.training.alignprop.truncation import (
    Truncation,
    check_truncation,
    ended_early,
    kept_steps,
)
from sampler.training.base import MicroBatchLoss, TrainerBase
from sampler.training.batches import Batch, micro_batches
from sampler.training.settings import Defaults

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.training.alignprop.window import GradientWindow
    from sampler.training.session import Session


@register("trainer", "alignprop")
@dataclass(frozen=True)
class AlignProp(TrainerBase):
    """Reward backpropagation through a window of K final sampling steps.

        minimise E[ loss_scale·l(r(decode(x_0), c)) ] + anchor·mean ||eps − eps_base||²
        l: maximise −r;   target |r − value|;   hinge max(0, value − r)

    Steps before the window run without a graph, and x enters it without gradient. Inside, the
    gradient flows through the network and through x. Each step of the window is recomputed in the
    backward pass, so that memory holds the graph of one step at a time.

    truncation: draw of the window, once per update: "fixed" (the last k steps; k = 1 is the
        paper's), "uniform" (from an index in low..high on), "gaussian" (from index N(mean·T, std·T)
        on; N(42, 5) of 50 is the authors' 2024 default and ours). "per_step" is the behaviour of
        TRL and of the authors' 2023 code: each step keeps its gradient iff a number drawn for it
        in low..high is at most its index. That is a random subset rather than a window: with 0..T
        half of all steps are kept, at the memory of half a run. "spread" is DRTune's, with
        through_input = False: k evenly spaced steps of the whole run, whose offset is drawn.
    k: 1 to T, the number of the sampler's steps. low, high: step indices. mean, std: shares of T.
    loss, value, loss_scale: as above. The scale matters through the clipping threshold and Adam's
        eps only; the gradient norm is logged before clipping.
    through_input: False cuts the gradient at the network's input and keeps the sampler's linear
        path, as in DRTune: cheaper, lower variance.
    lv: further images per sample, from noising x_0 to the last level and denoising it again;
        gradients are averaged (DRaFT-LV; with k = 1).
    ending: "walk" all steps; "jump" from the window's first level to x_0 in one step (ReFL).
    early: the run ends with such a jump at one of its last `early` steps, drawn per update
        (DRTune); 0 walks all steps.
    anchor: weight of the squared distance to the adapter-off prediction, on the window's steps.
    checkpointing: recompute each step in the backward pass; False keeps the graph.
    vae_slices: decode one image at a time.
    clamp: "hard" clips images to [0, 1] (no gradient at clipped values, as peers do);
        "straight_through" clips with gradient 1.
    """

    truncation: Truncation = "gaussian"
    k: Count = 1
    low: Annotated[int, Ge(0)] = 0
    high: Annotated[int, Ge(0)] | None = None
    mean: Annotated[float, Gt(0), Lt(1)] = 0.84
    std: Positive = 0.1
    loss: Literal["maximise", "target", "hinge"] = "maximise"
    value: float = 10.0
    loss_scale: Positive = 1.0
    through_input: bool = True
    lv: Annotated[int, Ge(0), DocInfo("0 is off")] = 0
    ending: Literal["walk", "jump"] = "walk"
    early: Annotated[int, Ge(0), DocInfo("0 is off")] = 0
    anchor: Annotated[float, Ge(0), DocInfo("0 is off")] = 0.0
    checkpointing: bool = True
    vae_slices: bool = False
    clamp: Literal["hard", "straight_through"] = "hard"

    reference: ClassVar[str] = (
        "Aligning Text-to-Image Diffusion Models with Reward Backpropagation (Prabhudesai et al., "
        "2023), arXiv:2310.03739; DRaFT (Clark et al., 2023), arXiv:2309.17400; ReFL: ImageReward "
        "(Xu et al., 2023), arXiv:2304.05977; DRTune (Wu et al., 2024), arXiv:2405.00760"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=50,
        sampler={"name": "ddim", "eta": 1.0},
        lr=1e-3,
        weight_decay=1e-4,
        clip=1.0,
        rank=4,
        alpha=4,
    )

    def __post_init__(self) -> None:
        if self.lv and (self.truncation != "fixed" or self.k != 1):
            raise ValueError("alignprop: lv needs truncation = 'fixed' and k = 1.")
        if self.early and (self.ending == "jump" or self.lv):
            other = "ending = 'jump'" if self.ending == "jump" else "lv"
            raise ValueError(f"alignprop: early and {other} end a run differently; give one.")

    @property
    def differentiates_decoder(self) -> bool:
        return True

    @property
    def unused(self) -> dict[str, str]:
        of = {
            "fixed": ("k",),
            "spread": ("k",),
            "gaussian": ("mean", "std"),
            "uniform": ("low", "high"),
            "per_step": ("low", "high"),
        }
        others = {key for keys in of.values() for key in keys} - {*of[self.truncation]}
        found = dict.fromkeys(sorted(others), f"truncation = {self.truncation!r}")
        return {**found, **({"value": "loss = 'maximise'"} if self.loss == "maximise" else {})}

    def check(self, session: Session) -> None:
        if session.reward is None or not session.reward.differentiable:
            name = session.reward.name if session.reward else "none"
            raise ValueError(
                f"alignprop needs a differentiable reward; {name!r} is not: use trainer 'ddpo' or "
                "'rlcm' with it."
            )
        total = _steps(session)
        check_truncation(self.truncation, total, self.k, self.low, self.high)
        if self.early > total:
            raise ValueError(
                f"alignprop: early = {self.early} must lie in 0..{total}, the number of sampling "
                "steps."
            )

    def window(self, session: Session, kept: Sequence[bool]) -> GradientWindow:
        """Return the sampling of a session with the gradient of the kept steps."""
        from sampler.training.alignprop.window import GradientWindow

        return GradientWindow(
            session,
            kept,
            self.through_input,
            self.lv,
            self.anchor,
            self.checkpointing,
            self.vae_slices,
            self.clamp,
        )

    def kept(self, total: int, batch: Batch) -> list[bool]:
        """Return which steps of an update are differentiated; fewer than `total` end in a jump."""
        kept = kept_steps(
            self.truncation,
            total,
            batch.random("truncation"),
            self.k,
            self.low,
            self.high,
            self.mean,
            self.std,
        )
        if self.ending == "jump":
            return kept[: kept.index(True) + 1]
        return ended_early(kept, self.early, batch.random("early")) if self.early else kept

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        import torch

        from sampler.training.online import over_processes

        nfe = 0
        kept = self.kept(_steps(session), batch)
        window, parts = self.window(session, kept), micro_batches(batch.rows, session.micro)
        for number, rows in enumerate(parts):
            sampled = window.sample(batch, rows)
            nfe += over_processes(session, sampled.nfe)
            prompts = [batch.prompts[row] for row in rows]
            scores = [session.score(images, prompts) for images in sampled.images]
            totals = torch.stack([found.total for found in scores])
            per_sample = self.loss_of(totals).mean(0) + self.anchor * sampled.drift
            of_parts = {
                f"reward_{name}": torch.stack([found.parts[name].detach() for found in scores])
                for name in scores[0].parts
            }
            yield MicroBatchLoss(
                per_sample.sum() / len(batch.prompts),
                {
                    "reward": totals.detach().mean(0),
                    **{name: values.mean(0) for name, values in of_parts.items()},
                    "K": len(kept) - kept.index(True),
                    "kept_steps": sum(kept),
                    "nfe": nfe,
                },
                step=number == len(parts) - 1,
            )

    def loss_of(self, scores: Tensor) -> Tensor:
        """Return the scaled loss of each score."""
        if self.loss == "maximise":
            return -scores * self.loss_scale
        if self.loss == "target":
            return (scores - self.value).abs() * self.loss_scale
        return (self.value - scores).clamp(min=0) * self.loss_scale


def _steps(session: Session) -> int:
    """Return the number of steps that the sampler makes, more than `session.steps` for some."""
    grid = session.pipeline.grid(session.steps, session.size)
    return len(session.method.levels(grid)) - 1
