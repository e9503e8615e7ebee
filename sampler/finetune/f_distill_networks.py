"""The networks of f-distill: a student and a fake score made of the teacher, a discriminator.

The teacher itself stays as it is and is shared: the discriminator's heads read its features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sampler.finetune.f_distill_data import Samples
from sampler.finetune.lora import adapted
from sampler.types import Level

Form = Literal["full", "lora"]


@dataclass(frozen=True)
class Distilled:
    """What a run trains, by group: "student.", "fake." and "heads." + the parameter's name.

    world: the pipeline's adapter with the models "main" (the teacher), "student" and "fake";
    average: of the student's parameters, what is saved and evaluated; real, pairs: samples for the
    discriminator and for the regression.
    """

    world: Any
    student: nn.Module
    parameters: dict[str, nn.Parameter]
    average: dict[str, Tensor]
    heads: Heads | None = None
    real: Samples | None = None
    pairs: Samples | None = None
    lora: Any = None

    def disable(self) -> None:
        """Nothing to do: the teacher is a network of its own."""

    def enable(self) -> None:
        """Nothing to do."""

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights and of the average, on the CPU."""
        averages = {f"ema.{k}": v for k, v in self.average.items()}
        both = {**self.parameters, **averages}
        return {k: v.detach().cpu().clone() for k, v in both.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes over weights that `tensors` gave."""
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(tensors[key])
            for key, value in self.average.items():
                value.copy_(tensors[f"ema.{key}"])

    @torch.no_grad()
    def follow(self, decay: float, updates: int) -> None:
        """The average after the student's update number `updates`, from 0.

        average ← d·average + (1 − d)·weights,   d = min(decay, (1 + n)/(10 + n))
        """
        weight = 1 - min(decay, (1 + updates) / (10 + updates))
        for key, value in self.average.items():
            value.lerp_(self.parameters[key].detach(), weight)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student has its average weights."""
        own = {k: self.parameters[k].detach().clone() for k in self.average}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for key, value in weights.items():
            self.parameters[key].copy_(value)


@dataclass(frozen=True)
class Recipe:
    """How the networks are made. student, fake: the form of what is trained; rank, alpha, targets:
    of adapters; features: names of the teacher's modules that the heads read, () for the default;
    seed: of adapters and heads."""

    student: Form
    fake: Form
    rank: int
    alpha: int
    targets: tuple[str, ...]
    seed: int
    features: tuple[str, ...] | None = field(default=())


@contextmanager
def distilled(adapter: Any, recipe: Recipe, probe: Any) -> Iterator[Distilled]:
    """The networks of a run; all that is made is let go of afterwards.

    probe: (x [1, ...], level, cond) of one row, for the shapes of the features. Without features
    (None) there is no discriminator.
    """
    with ExitStack() as stack:
        student, lora = _made(adapter.network, recipe.student, recipe, stack)
        fake, _ = _made(adapter.network, recipe.fake, recipe, stack)
        world = adapter.with_network("student", student).with_network("fake", fake)
        groups: dict[str, nn.Module] = {"student": student, "fake": fake}
        heads = None
        if recipe.features is not None:
            reader = Reader(world, recipe.features or default_features(adapter.network))
            heads = groups["heads"] = Heads(reader, probe, recipe.seed).to(adapter.device)
        parameters = {
            f"{group}.{name}": parameter
            for group, module in groups.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        average = {k: p.detach().clone() for k, p in parameters.items() if k.startswith("student.")}
        yield Distilled(world, student, parameters, average, heads, lora=lora)


def _made(network: Any, form: Form, recipe: Recipe, stack: ExitStack) -> tuple[nn.Module, Any]:
    """A copy of a network, trainable as a whole or through an adapter."""
    if hasattr(network, "peft_config"):
        raise ValueError("f_distill: the teacher carries adapters; fuse them, or take them off.")
    twin = copy.deepcopy(network).requires_grad_(False)
    if form == "lora":
        options = (recipe.rank, recipe.alpha, recipe.targets, recipe.seed)
        return twin, stack.enter_context(adapted(twin, *options))
    return twin.float().requires_grad_(True).eval(), None


class Reader:
    """Reads the outputs of some of the teacher's modules, as images [B, C, h, w].

    The evaluation ends at the last module that is read. Gradients reach x, not the teacher.
    """

    def __init__(self, world: Any, names: tuple[str, ...]) -> None:
        self.world, self.names = world, names
        known = dict(world.network.named_modules())
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"f_distill: the teacher has no module {unknown[0]!r:.60}.")

    def __call__(self, x: Tensor, level: Level, cond: Any) -> list[Tensor]:
        found: dict[str, Tensor] = {}

        def keeper(name: str) -> Any:
            def keep(module: Any, inputs: Any, output: Any) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output
                if len(found) == len(self.names):
                    raise _Enough

            return keep

        network = self.world.network
        hooks = [network.get_submodule(n).register_forward_hook(keeper(n)) for n in self.names]
        try:
            self.world.forward(x, level, cond, "main")
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [self._image(found[name], x) for name in self.names]

    def _image(self, value: Tensor, x: Tensor) -> Tensor:
        """Tokens [B, N, C] in their places; N may hold further ones (text), which come first."""
        if value.ndim == 4:
            return value
        patch = int(self.world.network.config.get("patch_size") or 1)
        high, wide = x.shape[-2] // patch, x.shape[-1] // patch
        return value[:, -high * wide :].transpose(1, 2).unflatten(2, (high, wide))


class _Enough(Exception):
    """All features are read: the rest of the network need not be computed."""


def default_features(network: Any) -> tuple[str, ...]:
    """A UNet's bottleneck; the middle one of a transformer's blocks.

    Raises ValueError for a network with neither.
    """
    if getattr(network, "mid_block", None) is not None:
        return ("mid_block",)
    blocks = getattr(network, "transformer_blocks", ())
    if not len(blocks):
        raise ValueError("f_distill: name the teacher's modules to read, features = [...].")
    return (f"transformer_blocks.{len(blocks) // 2}",)


class Heads(nn.Module):
    """One convolutional head per feature: logits [B, K] of being real, at a level, of a prompt."""

    def __init__(self, reader: Reader, probe: Any, seed: int) -> None:
        super().__init__()
        self.read = reader
        with torch.no_grad():
            shapes = [value.shape for value in reader(*probe)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(_head(*shape[1:]) for shape in shapes)

    def forward(self, x: Tensor, level: Level, cond: Any) -> Tensor:
        values = self.read(x, level, cond)
        logits = [head(v.float()) for head, v in zip(self.layers, values, strict=True)]
        return torch.cat([logit.flatten(1).mean(1, keepdim=True) for logit in logits], 1)


def _head(channels: int, high: int, wide: int) -> nn.Module:
    """4x4 convolutions of stride 2, down to at most 4x4, then one over all that is left."""
    layers: list[nn.Module] = []
    while min(high, wide) > 4:
        layers += [
            nn.Conv2d(channels, channels, 4, 2, 1),
            nn.GroupNorm(_groups(channels), channels),
            nn.SiLU(),
        ]
        high, wide = high // 2, wide // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, (high, wide)))


def _groups(channels: int) -> int:
    return next(n for n in range(min(32, channels), 0, -1) if channels % n == 0)
