"""Base class of the pipeline adapters.

An adapter reads a diffusers pipeline and never modifies it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sampler.core.adapter import ClassReader
from sampler.core.errors import ModelError
from sampler.core.locks import exclusive
from sampler.core.schedule import Schedule
from sampler.core.spacings import parsed
from sampler.pipelines.attention import NetworkAttention
from sampler.pipelines.latents import LatentImages
from sampler.pipelines.loras import without_loras
from sampler.pipelines.sizes import ImageSizes
from sampler.pipelines.texts import PromptTexts
from sampler.types import Branch, Cond, Level, Prediction, Span

UNREAD = (None, None, None)
HOOKS = ("_hf_hook", "_diffusers_hook")  # of accelerate (offloading) and diffusers (caching)


class Adapter(PromptTexts, LatentImages, ImageSizes, NetworkAttention):
    """Pipeline family; implements `sampler.core.adapter.PipelineAdapter`.

    A subclass sets `network_name` and defines `encode`, `forward` and, where they differ, `decode`,
    `latent_shape` and `check`. `weak`: a second network of the same signature. Safety checkers and
    watermarks of the stock pipeline are not run.

    processes: forward processes that the family is trained with. scale_argument: name of the
    guidance scale in the stock pipeline's call. embedded_scale: guidance scale for networks that
    take one as input, by default the stock pipeline's.
    """

    network_name = "unet"
    processes: tuple[str, ...] = ("vp", "edm", "flow")
    scale_argument = "guidance_scale"
    takes_classes = False
    classes: ClassReader | None = None  # for rules with a classifier (`classes.py`)
    student: Mapping[str, Any] | None = None  # manifest of the model "student"
    frames: int | None = None  # of a video
    levels: str = ""
    spacing: Any = None  # grid instead of the scheduler's own, see `Schedule.grid`
    lora_until: float | None = None  # share of a run's steps with LoRAs, None for all

    def __init__(self, pipe: Any, weak: Any = None) -> None:
        self.pipe = pipe
        self.network = getattr(pipe, self.network_name)
        if self.network is None:
            raise ModelError(
                f"This {type(pipe).__name__} has no {self.network_name}; load it with one."
            )
        self.networks = {"main": self.network}
        if weak is not None:
            self.networks["weak"] = weak
        self.models = tuple(self.networks)
        self._dtype: tuple[Tensor | None, torch.dtype | None, torch.dtype | None] = UNREAD
        self.check()
        name = type(pipe.scheduler).__name__
        try:
            self.schedule = self.read_schedule()
        except ValueError as error:
            raise ModelError(str(error)) from None
        if self.schedule.process not in self.processes:
            raise ModelError(
                f"{type(pipe).__name__} is trained with {' or '.join(self.processes)} levels, and "
                f"{name} has {self.schedule.process} ones; give it a scheduler of that kind.",
            )
        self.embedded_scale = self._default_of("guidance_scale")

    def with_network(self, name: str, network: Any) -> Adapter:
        """Return the adapter with another network of the main one's signature added."""
        twin = copy.copy(self)
        twin.networks = {**self.networks, name: network}
        twin.models = tuple(twin.networks)
        return twin

    def read_schedule(self) -> Schedule:
        """Read the levels of the pipeline's scheduler; ValueError for unknown ones."""
        return Schedule.from_config(self.pipe.scheduler.config, type(self.pipe.scheduler).__name__)

    def check(self) -> None:
        """Raise ModelError for a network of this family that is not supported."""

    @property
    def device(self) -> torch.device:
        """Device of the network, or the one that its offloading hooks move it to.

        diffusers' own property walks through every module of the pipeline, which is slow.
        """
        return self.pipe._execution_device if self._hooked else self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype; diffusers walks all its modules to find it.

        Kept until the next run begins, or the dtype of the first parameter changes.
        """
        first, own, dtype = self._dtype
        if dtype is None or (first is not None and first.dtype is not own):
            first, dtype = next(self.network.parameters(), None), self.network.dtype
            self._dtype = (first, None if first is None else first.dtype, dtype)
        return dtype

    @property
    def default_scale(self) -> float:
        """Default guidance scale of the stock pipeline."""
        return self._default_of(self.scale_argument)

    def _default_of(self, argument: str) -> float:
        """Default of an argument of the stock pipeline's call, 1 where it has none."""
        found = inspect.signature(type(self.pipe).__call__).parameters.get(argument)
        if found is None or found.default is None or found.default is found.empty:
            return 1.0
        return float(found.default)

    @property
    def default_sampler(self) -> str:
        """Sampler of the stock pipeline's scheduler, where that is more than an ODE solver."""
        return "consistency" if self.schedule.origin else "ddim"

    @property
    def default_guidance(self) -> dict[str, Any]:
        """Rule that the stock pipeline applies."""
        return {"name": "cfg", "scale": self.default_scale}

    def grid(self, steps: int, size: tuple[int, int]) -> tuple[Level, ...]:
        """Return the levels of a run for this image size; raises what `Schedule.grid` raises."""
        return self.schedule.grid(steps, spacing=self.spacing)

    def with_grid(self, spacing: Any) -> Adapter:
        """Return the adapter with another grid of levels, None for the scheduler's own.

        Raises ValueError for an unknown grid.
        """
        if spacing is not None:
            parsed(spacing)
        twin = copy.copy(self)
        twin.spacing = spacing
        return twin

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: tuple[int, int]
    ) -> Cond:
        """Encode B prompts; the negative ones only if `guided`."""
        raise NotImplementedError

    def exclusive(self) -> AbstractContextManager[None]:
        """Lock of a batch, for a network that changes between calls: by hooks, or its LoRAs."""
        switched = self._hooked or self.lora_until is not None
        return exclusive(self.network) if switched else nullcontext()

    def __call__(
        self, x: Tensor, span: Span, branches: Mapping[str, Branch], nfe: list[int]
    ) -> dict[str, Prediction]:
        if self.lora_until is not None and span.total:
            if span.index >= self.lora_until * span.total - 1e-9:
                with without_loras(self.network):
                    return super().__call__(x, span, branches, nfe)
        return super().__call__(x, span, branches, nfe)

    @property
    def _hooked(self) -> bool:
        return any(getattr(self.network, name, None) is not None for name in HOOKS)

    def apart(self, model: str) -> bool:
        return has_cache(self.networks[model])

    def context(self, level: Level, model: str, branch: str) -> AbstractContextManager[None]:
        # The names of stock pipelines; a cache keeps the residuals of each context apart.
        return self.network_at(level, model).cache_context(branch)

    def begin_run(self) -> None:
        """Clear what is kept of the last run, also by caches inside the networks."""
        self._dtype = UNREAD
        for network in self.networks.values():
            if has_cache(network):
                network._reset_stateful_cache()

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        return self.schedule.predict(x, out, level)

    def scaled(self, x: Tensor, level: Level) -> Tensor:
        """Scale x for the network (EDM), in its dtype."""
        factor, dtype = self.schedule.network_input(level), self.dtype
        x = x if factor == 1 else x * factor
        return x if x.dtype is dtype else x.to(dtype)

    def time(self, level: Level, like: Tensor) -> Tensor:
        """Timestep of a level: 0-d, integer where it is one, as in stock pipelines; or [R]."""
        if isinstance(level.t, (int, float)):
            return _constant(level.t, like.device)
        return torch.as_tensor(level.t, device=like.device)


def has_cache(network: Any) -> bool:
    """Return True where a block cache of diffusers is enabled inside a network.

    By its class: a module looks everywhere for an attribute that it does not have.
    """
    return getattr(type(network), "is_cache_enabled", None) is not None and network.is_cache_enabled


@lru_cache(maxsize=2048, typed=True)
def _constant(t: float, device: torch.device) -> Tensor:
    """Return a cached 0-d tensor; creating one on a GPU is a copy that blocks the host."""
    with torch.inference_mode(False):
        return torch.as_tensor(t, device=device)
