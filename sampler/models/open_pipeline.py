"""Open a model: find its files, read its pipeline and put it on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.config.model import DTYPES
from sampler.core.errors import ModelError, first_line
from sampler.models import preflight
from sampler.models.controlnet import with_controlnets
from sampler.models.folder import HUB_ID
from sampler.models.ip_adapter import apply_ip_adapters
from sampler.models.source import ModelSource, find_source

if TYPE_CHECKING:
    import torch

_STORED = {"F16": "float16", "BF16": "bfloat16"}


def find_files(source: Any, download: bool, options: dict[str, Any]) -> ModelSource:
    """The files of a model, after fetching a Hub model where `download` is set."""
    if not download or Path(source).expanduser().exists() or not HUB_ID.fullmatch(str(source)):
        return find_source(source, **options)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    chosen = {name: options[name] for name in ("revision", "variant")}
    try:
        folder = DiffusionPipeline.download(str(source), use_safetensors=True, **chosen)
    except Exception as error:
        raise ModelError(f"{source} cannot be downloaded: {first_line(error)}") from error
    return find_source(folder, **{**options, "revision": None})


def open_pipeline(
    source: ModelSource,
    dtype: Any,
    loras: list[tuple[Path, float]],
    *,
    controlnet: list[Path],
    ip_adapter: list[tuple[Path, float]],
    device: Any,
    offload: str | None,
    tiling: bool,
    slicing: bool,
) -> Any:
    """The pipeline of a source on its device, with adapters and the options of its VAE."""
    from sampler.models.lora import apply_loras
    from sampler.models.options import place, set_vae
    from sampler.models.read import load_or_refuse, read_pipeline, refuse_unknown

    refuse_unknown(source)
    pipe = read_pipeline(source, _dtype(dtype, _device(device), source))
    if controlnet:
        pipe = with_controlnets(pipe, controlnet)
    if loras:
        apply_loras(pipe, loras)
    if ip_adapter:
        apply_ip_adapters(pipe, ip_adapter)
    load_or_refuse(source.folder, lambda: place(pipe, _device(device), offload))
    set_vae(pipe, tiling, slicing)
    return pipe


def _device(device: Any) -> torch.device:
    import torch

    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device = {device!r:.40} is not a torch device; use 'cpu'.") from None


def _dtype(dtype: Any, device: torch.device, source: ModelSource) -> torch.dtype:
    import torch

    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    if name is None and device.type == "cuda":
        name = _STORED.get(preflight.stored_dtype(source.network_file))
    if name not in (None, *DTYPES):
        raise ValueError(f"dtype = {name!r:.40} must be one of {', '.join(DTYPES)}.")
    return getattr(torch, name or "float32")
