"""Interface between pipeline families and everything that samples with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from sampler.types import Cond, Level, Prediction

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sampler.core.schedule import Schedule

Size = tuple[int, int]  # (height, width) in pixels


class ClassReader(ABC):
    """Base of the classifiers of a model's images, for rules that steer by classes."""

    @abstractmethod
    def target(self, prompts: Sequence[str]) -> Tensor:
        """The class named by each of B prompts, int [B]."""

    @abstractmethod
    def conditions(self, prompts: Sequence[str], size: Size) -> Callable[[Tensor], Any]:
        """A function of classes [B] to the conditions [B, ...] of the same prompts with these."""

    @abstractmethod
    def classify(self, x0: Tensor) -> Tensor:
        """Logits [B, K] of latents [B, ...], differentiable."""


class PipelineAdapter(Protocol):
    """Pipeline family as the engine, workers, training and calibration use it.

    Prompts become conditions (`encode`), latents become images (`decode`), and the network between
    them is called as a `Denoiser`. `sampler.pipelines.base.Adapter` implements it.

    pipe: the diffusers pipeline, never modified. network_name: attribute of `pipe` that holds
    `network`. networks: {model name: network}, `models` its names. takes_classes: prompts may be
    class numbers. classes: a classifier that comes with the model. student: manifest of a distilled
    student. levels: name of levels other than the pipeline's own, or "". frames: number of frames
    of a video model, None for image models. embedded_scale: guidance scale for networks that take
    one as input. factor: pixels per latent along a side.
    """

    pipe: Any
    network: Any
    network_name: str
    networks: dict[str, Any]
    models: tuple[str, ...]
    schedule: Schedule
    takes_classes: bool
    classes: ClassReader | None
    student: Mapping[str, Any] | None
    frames: int | None
    levels: str
    embedded_scale: float
    spacing: Any

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def factor(self) -> int: ...
    @property
    def default_sampler(self) -> str: ...
    @property
    def default_guidance(self) -> dict[str, Any]: ...

    def size(self, height: int | None, width: int | None) -> Size: ...
    def grid(self, steps: int, size: Size) -> tuple[Level, ...]: ...
    def with_grid(self, spacing: Any) -> PipelineAdapter: ...
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]: ...
    def encode(
        self, prompts: Sequence[str], negative: Sequence[str], guided: bool, size: Size
    ) -> Cond: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def unclamped(self) -> PipelineAdapter: ...
    def latents_of(self, images: Tensor) -> Tensor: ...
    def predict(self, x: Tensor, out: Tensor, level: Level, model: str) -> Prediction: ...
    def check_mixed(self) -> None: ...
    @property
    def blocks(self) -> tuple[str, ...]: ...
    def recording(
        self, blocks: Sequence[str] = (), attention: Any = False, model: str = "main"
    ) -> AbstractContextManager[Any]: ...
    def word_tokens(self, prompts: Sequence[str], word: str) -> list[list[int]]: ...
    def with_guidance_scale(self, cond: Cond, scale: float) -> Cond: ...
    def exclusive(self) -> AbstractContextManager[None]: ...
    def with_network(self, name: str, network: Any) -> PipelineAdapter: ...
