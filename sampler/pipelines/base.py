"""What the engine has to know of a pipeline family, and the table of families.

An adapter reads a diffusers pipeline and never changes it. A new family is one file here with an
`@adapter(...)` class, and a line in `sampler/pipelines/__init__.py`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from sampler.denoisers import BatchedDenoiser
from sampler.schedule import Schedule
from sampler.types import Cond, Level, Prediction, SamplerError

A = TypeVar("A", bound="type[Adapter]")

_families: dict[str, type[Adapter]] = {}


def adapter(*pipeline_classes: str) -> Callable[[A], A]:
    """Class decorator: this adapter serves diffusers pipelines of these class names."""

    def add(cls: A) -> A:
        for name in pipeline_classes:
            _families[name] = cls
        return cls

    return add


def supported() -> list[str]:
    """The class names of the pipelines that can be loaded."""
    return sorted(_families)


def adapt(pipe: Any, weak: Any = None) -> Adapter:
    """The adapter of a diffusers pipeline; `weak`: a second network, for Autoguidance.

    Raises SamplerError (6) for a pipeline without adapter, naming those that have one, and for a
    network that needs inputs which the adapter does not have.
    """
    name = type(pipe).__name__
    if name not in _families:
        raise SamplerError(
            f"{name} is not a supported pipeline; supported: {', '.join(supported())}.", 6
        )
    return _families[name](pipe, weak)


class Adapter(BatchedDenoiser):
    """One pipeline family: prompts to conditions, latents to images, and the network between.

    A subclass sets `network_name` and answers `encode`, `forward` and, where they differ,
    `decode`, `latent_shape` and `check`. `weak`: a second network of the same signature. Safety
    checkers and watermarks of the stock pipeline are not run: `decode` gives what the VAE gives.
    """

    network_name = "unet"
    classes: Any = None  # a reader of classes, for rules with a classifier (`classes.py`)
    student: Any = None  # the manifest of the model "student", where there is one

    def __init__(self, pipe: Any, weak: Any = None) -> None:
        self.pipe = pipe
        self.network = getattr(pipe, self.network_name)
        self.networks = {"main": self.network}
        if weak is not None:
            self.networks["weak"] = weak
        self.models = tuple(self.networks)
        self._dtype: tuple[torch.dtype, torch.dtype] | None = None
        self.check()
        try:
            name = type(pipe.scheduler).__name__
            self.schedule = Schedule.from_config(pipe.scheduler.config, name)
        except ValueError as error:
            raise SamplerError(str(error), 6) from None

    def with_network(self, name: str, network: Any) -> Adapter:
        """The same adapter with a further network of the main one's signature."""
        twin = copy.copy(self)
        twin.networks = {**self.networks, name: network}
        twin.models = tuple(twin.networks)
        return twin

    def check(self) -> None:
        """Raises SamplerError (6) for a network of this family that cannot be served."""

    @property
    def device(self) -> torch.device:
        """Where the network runs: where it is, or where its offloading hooks will take it.

        diffusers' own answer walks through every module of the pipeline, which is slow.
        """
        hooked = hasattr(self.network, "_hf_hook") or hasattr(self.network, "_diffusers_hook")
        return self.pipe._execution_device if hooked else self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype; asking diffusers walks all its modules, so only after a change."""
        first = next(self.network.parameters(), None)
        if first is None:
            return self.network.dtype
        if self._dtype is None or self._dtype[0] != first.dtype:
            self._dtype = (first.dtype, self.network.dtype)
        return self._dtype[1]

    @property
    def default_scale(self) -> float:
        """The guidance scale that the stock pipeline uses when none is given."""
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get("guidance_scale")
        return float(parameter.default) if parameter is not None else 1.0

    @property
    def unit(self) -> int:
        """What height and width are multiples of: whole latents and, on transformers, patches.

        At least 8, as stock pipelines ask.
        """
        patch = self.network.config.get("patch_size") or 1
        return math.lcm(8, self.pipe.vae_scale_factor * patch)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, with the model's own size where None.

        Raises ValueError for a size that the latents cannot represent.
        """
        native = self.network.config.sample_size
        rows, cols = (native, native) if isinstance(native, int) else native
        factor = self.pipe.vae_scale_factor
        chosen = (
            rows * factor if height is None else height,
            cols * factor if width is None else width,
        )
        for label, value in zip(("height", "width"), chosen, strict=True):
            if value < self.unit or value % self.unit:
                raise ValueError(f"{label} = {value} must be a positive multiple of {self.unit}.")
        return chosen

    def grid(self, steps: int, size: tuple[int, int]) -> tuple[Level, ...]:
        """The levels of a run for an image of this size; see `Schedule.grid` for the errors."""
        return self.schedule.grid(steps)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of one latent, without the batch."""
        factor = self.pipe.vae_scale_factor
        return (self.network.config.in_channels, height // factor, width // factor)

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        """The conditions of B prompts; the unconditional ones only where `guided`."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, 3, H, W], float32 in [0, 1]."""
        vae = self.pipe.vae
        return self.pixels(vae, latents / vae.config.scaling_factor)

    def pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """The VAE's answer to unscaled latents, from [-1, 1] to [0, 1]."""
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return (images / 2 + 0.5).clamp(0, 1)

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        return self.schedule.predict(x, out, level)

    def scaled(self, x: Tensor, level: Level) -> Tensor:
        """x as the network wants to see it: scaled (EDM), in its dtype."""
        factor = self.schedule.network_input(level)
        return (x if factor == 1 else x * factor).to(self.dtype)

    def time(self, level: Level, like: Tensor) -> Tensor:
        """The level's timestep: 0-d, integer where it is one, as in stock pipelines; or [R]."""
        if isinstance(level.t, (int, float)):
            return _constant(level.t, like.device)
        return torch.as_tensor(level.t, device=like.device)


@lru_cache(maxsize=2048, typed=True)
def _constant(t: float, device: torch.device) -> Tensor:
    """A 0-d tensor, kept: on a GPU making one is a copy that the host waits for."""
    with torch.inference_mode(False):
        return torch.as_tensor(t, device=device)
