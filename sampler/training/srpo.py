"""SRPO: the gradient of a reward at the finished image, through one evaluation at a high level."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Gt, Le

from sampler.core.errors import UsageError
from sampler.registry import register
from sampler.registry.constraints import Fraction, Nonnegative, Positive
from sampler.rewards.compose import Contrast, said
from sampler.training.base import MicroBatchLoss, TrainerBase
from sampler.training.batches import Batch, micro_batches
from sampler.training.matching.levels import flow_sigma, level_at
from sampler.training.settings import Defaults, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from sampler.core.schedule import Schedule
    from sampler.rewards.base import RewardBase
    from sampler.training.online import Collected
    from sampler.training.session import Session

POINTS, EDGE = 1000, 5  # of the range of levels, and those at its ends that are not drawn
Ramp = tuple[Nonnegative, Nonnegative]


class Step(NamedTuple):
    """One Euler step of a branch: from the flow level `start` to `end`, and its weight k."""

    inversion: bool
    start: float
    end: float
    k: float


@register("trainer", "srpo")
@dataclass(frozen=True)
class SRPO(TrainerBase):
    """Direct alignment with semantic relative preference: one evaluation, at any noise level.

        x = (1 − a)·x0 + a·eps,   x̂0 = x0 + w·(D(x, a) − x0),   w = (a − b)/(a·(1 − b))
        loss = max(0, threshold − score(x̂0))/branches

    x0 is the sampled image and eps its own starting noise, both without gradient; D is the
    network's estimate of x0. x̂0 is the image after an Euler step from level a to b whose known
    noise is taken away, so that the reward sees a finished image at levels where D is a blur. The
    "denoise" branch has a > b and the score (1 + k)·r(positive) − r(negative), the "inversion"
    branch a < b, so w < 0, and the texts exchanged; k grows or falls linearly with the level. A
    positive or negative text is a control word before the prompt, one of each list per update.

    positive, negative: control words. With both lists empty the score is that of the prompt alone,
        on the denoise branch (direct alignment), for rewards that control words do not change.
    inversion: use the second branch, which needs control words.
    k_denoise, k_inversion: k at the clean end of the levels and at the noisy one.
    threshold: scores above it have no gradient; None is the loss −score without a limit. 0.7 is
        the authors', for HPS v2.1.
    low, high: range of the levels, as shares of the way from noise to image; shift: of the levels,
        above 1 towards noise. By default steps 5 to 25 of 50, as the authors have for HPS.
    gap: |a − b| as a share of the range, smaller near its ends.
    train_rule: "cond" trains the conditional branch alone; "sampling" the rule of the settings.
    checkpointing: recompute network and decoder in the backward pass. vae_slices, clamp: as in
        `alignprop`.

    One level is drawn per update, out of 1,000 that are equally spaced in sigma of the flow; a
    variance-preserving model gets the level of the same sigma/(1 − sigma). Metrics: reward of the
    sampled images; `score_denoise`, `score_inversion`; `start_denoise`, `start_inversion`: a.
    """

    positive: tuple[str, ...] = ("Natural-lighting", "Detail", "Detailed", "Real")
    negative: tuple[str, ...] = ("Concept art", "Painting", "Anime", "Flat", "Oil")
    inversion: bool = True
    k_denoise: Ramp = (0.1, 0.25)
    k_inversion: Ramp = (0.3, 0.01)
    threshold: float | None = 0.7
    low: Fraction = 0.1
    high: Fraction = 0.5
    shift: Positive = 3.0
    gap: Annotated[float, Gt(0), Le(1)] = 0.1
    train_rule: Literal["cond", "sampling"] = "cond"
    checkpointing: bool = True
    vae_slices: bool = False
    clamp: Literal["hard", "straight_through"] = "hard"

    reference: ClassVar[str] = (
        "Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference (Shen "
        "et al., 2025), arXiv:2509.06942, and its published code"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=25,
        sampler="ddim",
        lr=3e-4,
        weight_decay=1e-4,
        clip=0.1,
        rank=32,
        alpha=64,
        lr_full=5e-6,  # of the published code, which trains all weights
    )

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"srpo: low = {self.low:g} must be below high = {self.high:g}.")
        if bool(self.positive) != bool(self.negative):
            raise ValueError(
                "srpo: positive and negative need a control word each, or none, which scores the "
                "prompt alone."
            )

    @property
    def differentiates_decoder(self) -> bool:
        return True

    @property
    def unused(self) -> dict[str, str]:
        if not self.positive:
            return dict.fromkeys(("k_denoise", "k_inversion"), "positive = []")
        return {} if self.inversion else {"k_inversion": "inversion = False"}

    def check(self, session: Session) -> None:
        reward = session.reward
        if reward is None or not reward.differentiable:
            raise ValueError(
                f"srpo needs a differentiable reward; {reward.name if reward else 'none'!r} is "
                "not: use trainer 'nft' or 'awm' with it."
            )
        if self.positive and not reward.reads_prompt:
            raise ValueError(_unmoved(reward))

    def prepare(self, session: Session, prompts: list[str], out: Path, settings: Settings) -> None:
        """Raise UsageError for a reward that gives both control words the same score."""
        import torch

        if self.positive and session.reward is not None:
            noise = torch.rand(1, 3, *session.size, generator=torch.Generator().manual_seed(0))
            texts = [[said(words[0], prompts[0])] for words in (self.positive, self.negative)]
            with torch.no_grad():
                first, second = session.reward.of_texts(noise.to(session.pipeline.device), texts)
            if torch.equal(torch.as_tensor(first), torch.as_tensor(second)):
                raise UsageError(_unmoved(session.reward))

    def sigmas(self, schedule: Schedule) -> list[float]:
        """Return the flow levels of the range that the model has, descending."""
        ends = [1 - self.low, 1 - self.high]
        ends = [self.shift * s / (1 + (self.shift - 1) * s) for s in ends]
        first, last = (min(s, flow_sigma(level_at(schedule, s))) for s in ends)
        return [first + (last - first) * i / (POINTS - 1) for i in range(POINTS)]

    def steps(self, drawn: int, sigmas: list[float]) -> list[Step]:
        """Return the steps of an update; drawn: a number of points from the clean end."""
        width = min(POINTS - drawn, round(self.gap * POINTS), drawn)

        def step(inversion: bool, clean: int, ramp: tuple[float, float]) -> Step:
            near, far = sigmas[POINTS - clean], sigmas[POINTS - min(clean + width, POINTS)]
            k = ramp[0] + (ramp[1] - ramp[0]) * clean / (POINTS - 1)
            return Step(True, near, far, k) if inversion else Step(False, far, near, k)

        found = [step(False, drawn, self.k_denoise)]
        if self.inversion and self.positive:
            found.append(step(True, max(drawn - width, 1), self.k_inversion))
        return found

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        import torch

        from sampler.training.online import over_processes, sampled

        drawn = batch.random("levels").randint(EDGE, POINTS - EDGE)
        steps = self.steps(drawn, self.sigmas(session.pipeline.schedule))
        parts, nfe, least = micro_batches(batch.rows, session.micro), 0, math.inf
        for number, rows in enumerate(parts):
            with torch.no_grad():
                found = sampled(session, batch, rows)
            nfe += over_processes(session, found.nfe)
            metrics: dict[str, Any] = {"reward": found.reward, "nfe": nfe}
            metrics |= {f"reward_{name}": part for name, part in found.parts.items()}
            for step in steps:
                prompts = [batch.prompts[row] for row in rows]
                x0 = self.aligned(session, found, step)
                scores = self.scores(session, x0, prompts, step, batch.update)
                name = "inversion" if step.inversion else "denoise"
                metrics |= {f"score_{name}": scores.detach(), f"start_{name}": step.start}
                least = min(least, float(scores.detach().min()))
                loss = self.loss_of(scores).sum() / (len(steps) * len(batch.prompts))
                last = number == len(parts) - 1 and step is steps[-1]
                if last and batch.update == 0:
                    self.check_scores(least)
                yield MicroBatchLoss(loss, metrics, step=last)
                metrics = {}

    def aligned(self, session: Session, found: Collected, step: Step) -> Tensor:
        """Return x̂0 of sampled latents [B, ...]; the gradient is that of one evaluation."""
        from torch.utils.checkpoint import checkpoint

        from sampler.training.matching.update import predict_at

        run, schedule = found.run, session.pipeline.schedule
        noise = run.snapshot.x / schedule.initial_scale(run.levels)
        level = level_at(schedule, step.start)
        x = level.alpha * found.x0 + level.sigma * noise
        rule = run.rule if self.train_rule == "sampling" else None

        def estimate(x: Tensor) -> Tensor:
            pred = predict_at(session, run.cond, run.snapshot.seeds, x, level, rule)
            return pred.x0.tensor()

        d: Any = checkpoint(estimate, x, use_reentrant=False) if self.checkpointing else estimate(x)
        a = flow_sigma(level)
        return found.x0 + (a - step.end) / (a * (1 - step.end)) * (d - found.x0)

    def scores(
        self, session: Session, x0: Tensor, prompts: list[str], step: Step, update: int
    ) -> Tensor:
        """Return the scores [B] of decoded latents in a branch, which may be NaN or infinite."""
        from sampler.training.alignprop.window import GradientWindow

        window = GradientWindow(
            session,
            (True,),
            checkpointing=self.checkpointing,
            vae_slices=self.vae_slices,
            clamp=self.clamp,
        )
        if self.positive:
            lists = (self.positive, self.negative)
            first, second = (words[update % len(words)] for words in lists)
            first, second = (second, first) if step.inversion else (first, second)
            session = replace(session, reward=Contrast(session.reward, first, second, step.k))
        return session.scores(window.decode(x0), prompts).total

    def check_scores(self, least: float) -> None:
        """Warn where all scores of the first update are above the threshold already."""
        if self.threshold is not None and least > self.threshold:
            warnings.warn(
                f"srpo: scores begin at {least:.3g}, above threshold = {self.threshold:g}, where "
                "they have no gradient; raise it, or set threshold = None.",
                stacklevel=2,
            )

    def loss_of(self, scores: Tensor) -> Tensor:
        """Return the loss of each score."""
        return -scores if self.threshold is None else (self.threshold - scores).clamp(min=0)


def _unmoved(reward: RewardBase) -> str:
    return (
        f"srpo: control words do not change the score of {reward.name!r}, so that both branches "
        "would cancel; set positive and negative to [] to score the prompt alone."
    )
