"""Places of a pipeline's parts during a training: encoded prompts, text encoders, VAE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sampler.training.base import TrainerBase
from sampler.training.session import Session
from sampler.training.settings import Settings
from sampler.workers.prompt_cache import PromptCache


def check_placement(session: Session, trainer: TrainerBase, settings: Settings) -> None:
    """Raise ValueError for a cache of no text, and for parts that cannot wait in main memory."""
    pipeline, offload = session.pipeline, settings.offload
    hooked = getattr(pipeline.network, "_hf_hook", None) is not None
    if hooked and (offload or settings.adapter == "full"):
        given = "offload" if offload else "adapter = 'full'"
        raise ValueError(
            f"fit.{given}: the model is loaded with offload, which moves its weights itself; load "
            "it without."
        )
    kind = type(pipeline.pipe).__name__
    if settings.cache_text and not _parts(pipeline.pipe, "text"):
        raise ValueError(f"fit.cache_text: {kind} has no text encoder; leave it out.")
    if not offload:
        return
    if not _parts(pipeline.pipe, offload[0]) or not _parts(pipeline.pipe, offload[-1]):
        raise ValueError(f"fit.offload: {kind} has no such part; leave it out.")
    if "vae" in offload and trainer.differentiates_decoder:
        raise ValueError(
            f"{trainer.name}: the reward's gradient goes through the decoder, which has to stay "
            "on the device; leave 'vae' out of fit.offload."
        )
    if pipeline.device.type == "cpu":
        raise ValueError(
            "fit.offload: the model is in main memory already; leave it out, or train on a GPU."
        )


@contextmanager
def placed(session: Session, settings: Settings, out: Path) -> Iterator[Session]:
    """Give the session of a run whose prompts are encoded once, and whose idle parts wait.

    The parts are on their device again afterwards.
    """
    pipeline: Any = session.pipeline
    with ExitStack() as stack:
        for name in settings.offload:
            parts = _parts(pipeline.pipe, name)
            stack.callback(_move, parts, pipeline.device)
            _move(parts, torch.device("cpu"))
            pipeline = waiting(pipeline, name)
        if settings.cache_text:
            file = out / "text_cache" / f"{session.rank}.bin"
            cache = PromptCache(pipeline, (settings.text_cache_mb or 0) * 2**20, file)
            stack.callback(cache.close)
            pipeline = copy.copy(pipeline)
            pipeline.encode = cache.encode
        if pipeline is session.pipeline:
            yield session
        else:
            yield replace(session, engine=session.engine.with_pipeline(pipeline))


def waiting(pipeline: Any, name: str) -> Any:
    """Return the adapter with parts that are on the device while one of its methods uses them.

    name: "text", used by `encode`, or "vae", used by `decode` and `latents_of`.
    """
    twin = copy.copy(pipeline)
    parts, device = _parts(pipeline.pipe, name), pipeline.device
    for method in ("encode",) if name == "text" else ("decode", "latents_of"):
        setattr(twin, method, _on_device(getattr(pipeline, method), parts, device))
    if name == "vae":
        twin.unclamped = lambda: waiting(pipeline.unclamped(), name)
    return twin


def _on_device(function: Callable[..., Any], parts: Sequence[Any], device: Any) -> Any:
    def called(*arguments: Any) -> Any:
        _move(parts, device)
        try:
            return function(*arguments)
        finally:
            _move(parts, torch.device("cpu"))

    return called


def _move(parts: Sequence[Any], device: torch.device) -> None:
    for part in parts:
        part.to(device)


def _parts(pipe: Any, name: str) -> list[torch.nn.Module]:
    """Return the text encoders or the VAE of a pipeline."""
    start = "text_encoder" if name == "text" else "vae"
    found = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    return [part for key, part in found.items() if key.startswith(start)]
