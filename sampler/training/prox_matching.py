"""Proximal matching: learned proximal networks on the latents of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from sampler.registry import register
from sampler.registry.constraints import Count, Fraction, Nonnegative, Positive
from sampler.training.base import MicroBatchLoss, TrainerBase
from sampler.training.batches import Batch, derived, micro_batches
from sampler.training.settings import Defaults

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from sampler.models.proximal import ProximalNetwork
    from sampler.training.data import LatentSet
    from sampler.training.session import Session
    from sampler.training.settings import Settings


@dataclass(frozen=True)
class Learned:
    """The trained network and the latents that it learns."""

    network: ProximalNetwork
    data: LatentSet

    @property
    def parameters(self) -> dict[str, Parameter]:
        return dict(self.network.named_parameters())

    def disable(self) -> None:
        """Do nothing: the pipeline's network is not changed."""

    def enable(self) -> None:
        """Do nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the weights, on the CPU."""
        return {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore weights that `tensors` returned."""
        self.network.load_state_dict(tensors)


@register("trainer", "prox_matching")
@dataclass(frozen=True)
class ProxMatching(TrainerBase):
    """Proximal matching: a network that is the proximal operator of the data's −log p.

        x = x0 + noise·n,   f = grad psi, psi input-convex
        loss = mean|f(x) − x0|, then 1 − exp(−‖f(x) − x0‖²/gamma_k²)
        gamma_k = gamma·√D·(8, 4, 2, 1)

    The pipeline gives the space of the data and, without `data`, the data; its network is not
    changed. The result in lpn/ is a `sampler.models.proximal.ProximalNetwork`, the denoiser of
    the sampler `admm`. No reward is used.

    noise: standard deviation of the noise, which decides the strength of the prior; the published
        0.05 and 0.1 are for images in [0, 1], that is 0.1 and 0.2 in [-1, 1].
    gamma: the smallest, per square root of the number of elements; 0.08 in [0, 1] as published.
    pretraining: number of first updates with the absolute error, which is needed: far from x0
        proximal matching has no gradient. stage: number of updates of each gamma_k. stages: number
        of the gamma_k, each half of the one before; the last one is kept.
    fall: factor of the learning rate after the pretraining.
    hidden: channels of a layer. layers: number of convolutions, of which every second halves the
        size. beta: of the softplus. alpha: strong convexity of psi. All of them are described in
        `sampler.models.proximal.ProximalConfig`.
    data: a folder of images with metadata.jsonl, or a .safetensors file of latents, as for
        `f_distill`; None uses images of the model. samples: their number.
    """

    noise: Positive = 0.2
    gamma: Positive = 0.16
    pretraining: Annotated[int, Ge(0)] = 20_000
    stage: Count = 5_000
    stages: Count = 4
    fall: Fraction = 0.1
    hidden: Count = 64
    layers: Count = 4
    beta: Positive = 10.0
    alpha: Nonnegative = 0.01
    data: str | None = None
    samples: Count = 256

    needs_reward: ClassVar[bool] = False
    reference: ClassVar[str] = (
        "What's in a Prior? Learned Proximal Networks for Inverse Problems (Fang et al., 2024), "
        "arXiv:2310.14344, and its published code"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=20,
        sampler={"name": "ab", "order": 2},
        lr=1e-3,
        weight_decay=0.0,
        clip=0.0,
        rank=1,
        alpha=1.0,
        adapter=None,
    )

    def for_dry_run(self, prompts: int) -> ProxMatching:
        return replace(self, samples=min(self.samples, prompts))

    def data_of(
        self, session: Session, prompts: list[str], out: Path, settings: Settings
    ) -> LatentSet:
        """Return the latents to learn; they are generated or encoded where they are not on disk.

        Raises ValueError for a prompt without a sample.
        """
        from sampler.training.data import data_samples
        from sampler.training.f_distill.teacher import teacher_samples

        if self.data is not None:
            found = data_samples(session, self.data, out / "data.safetensors")
        else:
            precision, folder = settings.mixed_precision, out / "samples"
            count, seed = self.samples, settings.seed
            found = teacher_samples(session, prompts, count, seed, folder, precision)
        found.check(prompts)
        return found

    def check_settings(self, settings: Settings) -> None:
        for name in ("adapter", "cache_text", "ema", "init_lora", "offload", "eval_every"):
            if getattr(settings, name):
                raise ValueError(
                    f"prox_matching: fit.{name} is of trainers that change the model; leave it out."
                )

    def prepare(self, session: Session, prompts: list[str], out: Path, settings: Settings) -> None:
        self.data_of(session, prompts, out, settings)

    @contextmanager
    def trainable(
        self, session: Session, prompts: list[str], out: Path, settings: Settings
    ) -> Iterator[Learned]:
        import torch

        from sampler.models.proximal import ProximalConfig, ProximalNetwork

        shape = tuple(session.pipeline.latent_shape(*session.size))
        config = ProximalConfig(shape, self.hidden, self.layers, self.beta, self.alpha)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived(settings.seed, 0, "adapter"))
            network = ProximalNetwork(config).to(session.pipeline.device)
        yield Learned(network, self.data_of(session, prompts, out, settings))

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        from sampler.core.noise import Noise
        from sampler.objectives import proximal_gamma, proximal_matching_loss

        learned: Learned = session.trainable
        smallest = self.gamma * learned.data.latents[0].numel() ** 0.5
        gamma = proximal_gamma(batch.update, self.pretraining, self.stage, self.stages, smallest)
        parts = micro_batches(batch.rows, session.micro)
        for rows in parts:
            prompts = [batch.prompts[row] for row in rows]
            chosen = [batch.random(f"sample {row}").random() for row in rows]
            x0 = learned.data.latents[learned.data.choose(prompts, chosen)]
            x0 = x0.to(session.pipeline.device)
            n = Noise(tuple(batch.seeds[row] for row in rows)).draw(0, x0, "renoise")
            out = learned.network(x0 + self.noise * n)
            loss = proximal_matching_loss(out, x0, gamma)
            error = (out.detach() - x0).abs().flatten(1).mean(1)
            metrics: dict[str, Any] = {"error": error, "gamma": gamma or 0.0}
            fall = 1.0 if gamma is None else self.fall
            yield MicroBatchLoss(
                loss.sum() / len(batch.prompts), metrics, step=rows is parts[-1], lr=fall
            )
        learned.network.clip()  # after the step: without it psi is not convex

    def save(self, session: Session, out: Path, manifest: dict[str, Any]) -> Path:
        from sampler.models.proximal_files import save_proximal

        return save_proximal(session.trainable.network, out / "lpn", manifest)
