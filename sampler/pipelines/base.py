"""Base class of the pipeline adapters.

An adapter reads a diffusers pipeline and never modifies it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from sampler.core.adapter import ClassReader
from sampler.core.denoisers import BatchedDenoiser
from sampler.core.errors import ModelError
from sampler.core.locks import exclusive
from sampler.core.schedule import Schedule
from sampler.core.spacings import parsed
from sampler.core.stacking import stack
from sampler.pipelines.latents import LatentImages
from sampler.pipelines.layouts import layout_of
from sampler.pipelines.loras import without_loras
from sampler.pipelines.negative import mixed, paired
from sampler.pipelines.recording import INPUT, Recording, blocks_of
from sampler.pipelines.recording_hooks import recorded
from sampler.pipelines.texts import PromptTexts
from sampler.types import Branch, Cond, Level, Prediction, Span

HOOKS = ("_hf_hook", "_diffusers_hook")  # of accelerate (offloading) and diffusers (caching)


class Adapter(PromptTexts, LatentImages, BatchedDenoiser):
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
        self._dtype: tuple[torch.dtype, torch.dtype] | None = None
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
        """The network's dtype, cached: diffusers walks all its modules to find it."""
        first = next(self.network.parameters(), None)
        if first is None:
            return self.network.dtype
        if self._dtype is None or self._dtype[0] != first.dtype:
            self._dtype = (first.dtype, self.network.dtype)
        return self._dtype[1]

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

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return self.pipe.vae_scale_factor

    @property
    def patch(self) -> int:
        """Latents per token of the network, along each side."""
        return self.network.config.get("patch_size") or 1

    @property
    def native(self) -> tuple[int, int]:
        """(height, width) that the model was trained for, in latents."""
        own = self.network.config.sample_size
        return (own, own) if isinstance(own, int) else tuple(own)

    @property
    def unit(self) -> int:
        """Divisor of height and width: whole latents and, for transformers, patches.

        At least 8, as in the stock pipelines.
        """
        return math.lcm(8, self.factor * self.patch)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return (height, width) in pixels, with the model's own size where None.

        Raises ValueError for a size that the latents cannot represent.
        """
        rows, cols = self.native
        chosen = (
            rows * self.factor if height is None else height,
            cols * self.factor if width is None else width,
        )
        for label, value in zip(("height", "width"), chosen, strict=True):
            if value < self.unit or value % self.unit:
                raise ValueError(f"{label} = {value} must be a positive multiple of {self.unit}.")
        return chosen

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

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""
        return (self.network.config.in_channels, height // self.factor, width // self.factor)

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
        last = math.inf if self.lora_until is None else self.lora_until * span.total - 1e-9
        with nullcontext() if span.index < last or not span.total else without_loras(self.network):
            return super().__call__(x, span, branches, nfe)

    @property
    def _hooked(self) -> bool:
        return any(getattr(self.network, name, None) is not None for name in HOOKS)

    def apart(self, model: str) -> bool:
        return getattr(self.networks[model], "is_cache_enabled", False)

    def context(self, level: Level, model: str, branch: str) -> AbstractContextManager[None]:
        # The names of stock pipelines; a cache keeps the residuals of each context apart.
        return self.network_at(level, model).cache_context(branch)

    def begin_run(self) -> None:
        """Clear what caches inside the networks have kept of the last run."""
        for network in self.networks.values():
            if getattr(network, "is_cache_enabled", False):
                network._reset_stateful_cache()

    def mixed_rows(self, model: str) -> int:
        return layout_of(self.networks[model]).rows

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that can be recorded: "input", then those of the network."""
        return (INPUT, *blocks_of(self.network))

    def recording(
        self,
        blocks: Sequence[str] = (),
        attention: bool | Literal["grad"] = False,
        model: str = "main",
    ) -> AbstractContextManager[Recording]:
        """Record what a network does inside a `with` statement, by this thread.

            with adapter.recording(("up.0",), attention=True) as seen:
                engine.generate("a fox", steps=4)
            seen.blocks["up.0"][0]      # [R, C, h, w] of the first step

        blocks: names out of `blocks`. attention: also the probabilities of image tokens on text
        tokens, in the layers inside these blocks, of the whole network where none is named. Images
        are bit-equal with and without; with "grad" the network computes with these probabilities,
        rounded differently, so that scores can be differentiated (`Recording.weighted`).

        Raises ValueError for an unknown block, and for a network whose attention is not torch's or
        is not known here.
        """
        return recorded(self.networks[model], blocks, attention)

    def check_mixed(self) -> None:
        """Raise ValueError for a network whose attention cannot hold a negative prompt."""
        layout_of(self.network)

    def forward_mixed(
        self, x: Tensor, level: Level, cond: Any, negative: Any, mixing: Any, model: str
    ) -> Tensor:
        network = self.network_at(level, model)
        if self.mixed_rows(model) == 1:
            with mixed(network, mixing, self.text_states(negative, model)):
                return self.forward(x, level, cond, model)
        twice = Level(
            *(torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for v in level)
        )
        with mixed(network, mixing):
            both = paired(cond, negative, stack)
            return self.forward(torch.cat([x, x]), twice, both, model)[: x.shape[0]]

    def network_at(self, level: Level, model: str) -> Any:
        """Network that is called at a level."""
        return self.networks[model]

    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction:
        return self.schedule.predict(x, out, level)

    def scaled(self, x: Tensor, level: Level) -> Tensor:
        """Scale x for the network (EDM), in its dtype."""
        factor = self.schedule.network_input(level)
        return (x if factor == 1 else x * factor).to(self.dtype)

    def time(self, level: Level, like: Tensor) -> Tensor:
        """Timestep of a level: 0-d, integer where it is one, as in stock pipelines; or [R]."""
        if isinstance(level.t, (int, float)):
            return _constant(level.t, like.device)
        return torch.as_tensor(level.t, device=like.device)


def class_ids(prompts: Sequence[str], count: int, labels: Mapping[str, int]) -> list[int]:
    """Class numbers of prompts that name classes by number or by label.

    Raises ValueError for an unknown class.
    """
    found = []
    for prompt in prompts:
        number = int(prompt) if prompt.strip().isdecimal() else labels.get(prompt.strip(), -1)
        if not 0 <= number < count:
            raise ValueError(
                f"The prompt {prompt!r:.60} is not a class of this model; give a number in "
                f"0..{count - 1}{' or a label of the pipeline' if labels else ''}."
            )
        found.append(number)
    return found


@lru_cache(maxsize=2048, typed=True)
def _constant(t: float, device: torch.device) -> Tensor:
    """Return a cached 0-d tensor; creating one on a GPU is a copy that blocks the host."""
    with torch.inference_mode(False):
        return torch.as_tensor(t, device=device)
