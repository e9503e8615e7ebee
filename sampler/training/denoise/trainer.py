"""Supervised fine-tuning on images and captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sampler.core.errors import SamplerError, UsageError
from sampler.registry import register
from sampler.registry.constraints import Count, Fraction, Positive
from sampler.training.base import MicroBatchLoss, TrainerBase
from sampler.training.batches import Batch
from sampler.training.settings import Defaults
from sampler.training.times import time_law

if TYPE_CHECKING:
    from sampler.training.averages import Averaged
    from sampler.training.session import Session
    from sampler.training.settings import Settings


@register("trainer", "denoise")
@dataclass(frozen=True)
class Denoise(TrainerBase):
    """Supervised fine-tuning: the denoising error on images of your own, with their captions.

        x = alpha·x0 + sigma·eps,   loss = w·mean((out − out*)²)

    out is the network's output in its own parametrisation (eps, x0, v or velocity) and out* the
    exact one. Every pass over the images has a random order of its own, so that captions may be
    repeated; batches are of `fit.batch` images. Sampler, guidance, steps and reward of the
    settings are those of evaluations; the rule "embedded" also sets the scale that a network takes
    as an input.

    data: a folder or table of images with captions, or latents (sampler/training/data.py).
        caption: of images without one.
    times: law of the noise levels, "uniform", "logit_normal", "movis", "pieces" or "laplace", or a
        mapping with its fields (sampler/training/times.py).
    weight: w, "none" (1) or "min_snr", which weights the error of x0 by min(SNR, gamma).
    gamma: above 0, of "min_snr". dropout: share of samples whose caption is left out, so that
        guidance still works; they are trained as the rule's branch without a condition.
    crop: scale images of another size to cover the trained one and crop them at the centre; False
        refuses them. count: use the first images only, None for all.
    """

    data: str
    caption: str | None = None
    times: Any = "uniform"
    weight: Literal["none", "min_snr"] = "none"
    gamma: Positive = 5.0
    dropout: Fraction = 0.1
    crop: bool = True
    count: Count | None = None

    reference: ClassVar[str] = (
        "Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239, eq. 14; "
        "weights: Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023), "
        "arXiv:2303.09556; dropout: Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), "
        "arXiv:2207.12598; defaults: train_text_to_image_lora.py of diffusers"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=20,
        sampler={"name": "ab", "order": 2},
        lr=1e-4,
        weight_decay=1e-2,
        clip=1.0,
        rank=4,
        alpha=4,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", time_law(self.times, "denoise: times"))

    @property
    def scheduled(self) -> bool:
        return self.times.scheduled

    @property
    def needs_reward(self) -> bool:
        return False

    def texts(self, given: list[str]) -> list[str]:
        """Return the captions of the data. Raises UsageError for other prompts."""
        from sampler.training.data import captions

        if given:
            raise UsageError(
                "denoise: the prompts are the captions of its data; leave them out, and give those "
                "of evaluations as fit.eval_prompts."
            )
        return captions(self.data, self.caption)[: self.count]

    def for_dry_run(self, prompts: int) -> Denoise:
        return replace(self, count=min(prompts, self.count or prompts))

    def check(self, session: Session) -> None:
        """Raise ValueError for a few-step model, and for one of Karras' levels."""
        pipeline = session.pipeline
        if pipeline.student is not None or pipeline.default_sampler == "consistency":
            raise ValueError(
                "denoise: images blur few-step models, which no longer denoise in small steps; "
                "train their teacher."
            )
        if pipeline.schedule.process not in ("vp", "flow"):
            raise ValueError(
                f"denoise trains variance-preserving and flow models; the levels of this one are "
                f"{pipeline.schedule.process}."
            )

    def prepare(self, session: Session, prompts: list[str], out: Path, settings: Settings) -> None:
        self._samples(session, out)

    def _samples(self, session: Session, out: Path) -> Any:
        from sampler.training.data import data_samples

        path = out / "data.safetensors"
        return data_samples(session, self.data, path, self.caption, self.crop, self.count)

    @contextmanager
    def trainable(
        self, session: Session, prompts: list[str], out: Path, settings: Settings
    ) -> Iterator[Averaged]:
        with self.averaged(session, settings) as averaged:
            yield replace(averaged, data=self._samples(session, out))

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        from sampler.training.denoise.update import DenoiseObjective, Update

        data = session.trainable.data
        if data is None:
            raise SamplerError("denoise: the run has no data.")
        objective = DenoiseObjective(self.times, self.weight, self.gamma, self.dropout)
        return Update(objective, session, batch, data).losses()
