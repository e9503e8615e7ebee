"""f-distill: one- or few-step students of a guided teacher, by any f-divergence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.registry import register
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, derived
from sampler.training.f_distill.fields import DistillFields
from sampler.training.settings import Defaults

if TYPE_CHECKING:
    from sampler.training.f_distill.networks import Distilled
    from sampler.training.f_distill.step import DistillStep
    from sampler.training.session import Session
    from sampler.training.settings import Settings


@register("trainer", "f_distill")
@dataclass(frozen=True)
class FDistill(DistillFields):
    """Distribution matching of a student with a guided teacher, under any f-divergence.

        G(z) = x0-estimate of the student from noise z at its first time
        x_t = alpha·G(z) + sigma·eps,  r = p_teacher/p_student at x_t, from a discriminator
        grad = −E[h(r)·(score_teacher − score_fake)(x_t)·dG],   h(r) = f''(r)·r²

    Three networks are trained in turn: the student; the fake score, a copy of the teacher that
    denoises the student's images; and convolutional heads on the teacher's features that
    discriminate real images from the student's. Every `student_every`-th update is the student's,
    the others train the two critics. Guidance rule, negative prompt, steps and sampler of the
    settings are the teacher's, and the student learns the guided prediction. No reward is used.

    divergence: rkl (mode seeking; DMD with gan_weight 0, else DMD2), sf, js, sh, kl, jf, lecam,
        chi2, neyman.
    gan_weight: of the student's adversarial loss; 0 omits the discriminator (rkl only).
    timesteps: the times at which the student is evaluated, noisy first; () is the noisiest alone.
        A student of several steps is trained behind its own earlier steps.
    trajectory: how they follow on each other. "renoised" (default): x' = alpha'·D + sigma'·z with
        fresh noise z, and D is matched. "own": x' = alpha'·D + sigma'·eps with D and eps of one
        evaluation, and x' is matched, noised further to a level t (TDM); the loss of the fake
        score is then min(SNR, 5)·||D_fake − D||² with the weight of the mixed noise.
    separate, huber: of "own". separate: t stays below the level of its step, as the authors advise;
        it goes up to the noisiest by default. huber: c of sqrt(d² + c²) − c in place of d², 1e-3
        in the authors' code; None is off.
    guidance_times: a range like `times` in which the guidance term D_guided − D_c of the target
        has a level of its own; None uses that of D_c − D_fake.
    student, fake: "full" weights, or "lora" with the settings' rank, alpha and targets.
    init: a folder with the student's first weights, such as another student's; None copies the
        teacher.
    data: a folder or table of images with captions, or a .safetensors file of latents
        (sampler/training/data.py); None uses `samples` images of the teacher.
    samples: number of the teacher's images to generate, for the discriminator without data, and
        for the warm-up.
    warmup: number of first updates, in which the student alone learns the teacher's images from
        their noise (with a deterministic sampler). 0 is the paper's.
    student_every: 5; 10 is the authors' for Stable Diffusion, 2 (one critics' update for one of the
        student's) that of TDM. student_lr: factor of the learning rate in the student's updates,
        0.2 for TDM. ema: decay of the student's moving average, which is saved.
    low, high: clamp of the ratio. bins, memory: number of noise-level bins of its normalisation,
        and the EMA decay of their means.
    times: the range of noise levels, as fractions of the training times. law: their law within
        it, "uniform" or another of `sampler/training/times.py`.
    features: names of the teacher's modules that the heads read; () is a UNet's bottleneck, or the
        middle block of a transformer.

    Deviations from the authors' code: all gradients are clipped as the settings say; noise levels
    are by default drawn uniformly in t for every kind of schedule.
    """

    reference: ClassVar[str] = (
        "One-step Diffusion Models with f-Divergence Distribution Matching (Xu et al., 2025), "
        "arXiv:2502.15681; DMD2: Improved Distribution Matching Distillation (Yin et al., 2024), "
        "arXiv:2405.14867; Learning Few-Step Diffusion Models by Trajectory Distribution Matching "
        "(Luo et al., 2025), arXiv:2503.06674; Decoupled DMD (Liu et al., 2025), arXiv:2511.22677"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=20,
        sampler={"name": "ab", "order": 2},
        lr=1e-5,
        weight_decay=0.01,
        clip=1.0,
        rank=64,
        alpha=64,
        adapter=None,
    )

    @property
    def scheduled(self) -> bool:
        return self.law.scheduled

    @property
    def needs_reward(self) -> bool:
        return False

    def for_dry_run(self, prompts: int) -> FDistill:
        return replace(self, samples=min(self.samples, prompts))

    def start(self) -> Any:
        return {"bins": [1.0] * self.bins, "students": 0}

    def check(self, session: Session) -> None:
        from sampler.training.f_distill.setup import check_teacher, trajectory_of

        check_teacher(session, self.warmup > 0, self.guidance_times is not None)
        trajectory_of(self, session)

    def check_settings(self, settings: Settings) -> None:
        if settings.ema:
            raise ValueError("f_distill: fit.ema is of trainers of a LoRA; set ema in trainer.")
        if settings.adapter is not None:
            raise ValueError(
                "f_distill: fit.adapter is of trainers that change the model; set student and "
                "fake in trainer, 'full' or 'lora' each."
            )
        if settings.init_lora is not None:
            raise ValueError(
                "f_distill: fit.init_lora is of trainers of a LoRA on the model itself; give a "
                "student's first weights as init."
            )

    def prepare(self, session: Session, prompts: list[str], out: Path, settings: Settings) -> None:
        from sampler.training.f_distill.teacher import samples_of

        samples_of(self, session, prompts, out, settings)

    @contextmanager
    def trainable(
        self, session: Session, prompts: list[str], out: Path, settings: Settings
    ) -> Iterator[Distilled]:
        from sampler.training.f_distill.networks import NetworkOptions, build_networks
        from sampler.training.f_distill.setup import feature_probe, trajectory_of
        from sampler.training.f_distill.teacher import samples_of

        real, pairs = samples_of(self, session, prompts, out, settings)
        options = NetworkOptions(
            self.student,
            self.fake,
            settings.rank or 1,
            settings.alpha or 1.0,
            settings.targets or (),
            derived(settings.seed, 0, "adapter"),
            self.features if self.gan_weight else None,
            self.init,
        )
        probe = feature_probe(session, trajectory_of(self, session).levels[0], prompts[0])
        with build_networks(session.pipeline, options, probe) as distilled:
            yield replace(distilled, real=real, pairs=pairs)

    def step(self, session: Session, batch: Batch) -> DistillStep:
        """Return one update of a session on a batch."""
        from sampler.training.f_distill.losses import Weighting
        from sampler.training.f_distill.setup import trajectory_of
        from sampler.training.f_distill.step import DistillObjective, DistillStep

        objective = DistillObjective(
            trajectory_of(self, session),
            Weighting(self.divergence, self.low, self.high, self.times, self.memory),
            self.gan_weight,
            self.ema,
            self.law,
            self.guidance_times,
            self.student_lr,
        )
        return DistillStep(objective, session, batch)

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        step, number = self.step(session, batch), batch.update - self.warmup
        if number < 0:
            return step.regression(state)
        if number % self.student_every == self.student_every - 1:
            return step.matching(state)
        return step.critics()

    def evaluation_session(self, session: Session) -> AbstractContextManager[Session]:
        from sampler.training.f_distill.student import student_session

        return student_session(session, self.manifest(session))

    def save(self, session: Session, out: Path, manifest: dict[str, Any]) -> Path:
        from sampler.training.f_distill.student import save_student

        return save_student(session, out / "student", self.manifest(session), manifest)

    def manifest(self, session: Session) -> dict[str, Any]:
        """Describe the student as plain data."""
        from sampler.training.f_distill.student import student_manifest

        return student_manifest(self, session)
