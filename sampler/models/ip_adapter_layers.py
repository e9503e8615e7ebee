"""Layers of IP-Adapters in the networks of the families, and their image encoders.

UNets take any number of adapters, in their cross-attention; Flux in its double blocks; Stable
Diffusion 3 one, in all its joint attention, with an image encoder of SigLIP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sampler.core.errors import ModelError
from sampler.models.read import load_or_refuse, quiet, refuse_missing_weights

State = Mapping[str, Mapping[str, Any]]  # "image_proj" and "ip_adapter", tensors by name

# Parts of names in the files of Flux adapters as XLabs publishes them, and the usual ones.
_RENAMED = (
    ("ip_adapter_proj_model.", "image_proj."),
    ("double_blocks.", "ip_adapter."),
    ("processor.ip_adapter_double_stream_k_proj", "to_k_ip"),
    ("processor.ip_adapter_double_stream_v_proj", "to_v_ip"),
)


def usual_name(name: str) -> str:
    """Name of a tensor as most published files have it."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def takes_ip_adapters(pipe: Any) -> bool:
    """Return whether a pipeline has a loader of IP-Adapters."""
    from diffusers.loaders import ip_adapter as loaders

    kinds = loaders.IPAdapterMixin, loaders.FluxIPAdapterMixin, loaders.SD3IPAdapterMixin
    return isinstance(pipe, kinds)


def tensors_of(pipe: Any) -> set[str]:
    """Names of the tensors that an adapter of a pipeline's network has, without `ip_adapter.`."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    if _of_flux(pipe):
        names = pipe.transformer.attn_processors
        double = [name for name in names if not name.startswith("single_transformer_blocks")]
        parts = [f"to_{part}_ip.{kind}" for part in "kv" for kind in ("weight", "bias")]
        return {f"{k}.{part}" for k in range(len(double)) for part in parts}
    if _of_sd3(pipe):
        layer = SD3IPAdapterJointAttnProcessor2_0(2, 2, 2, 2).state_dict()
        count = len(pipe.transformer.attn_processors)
        return {f"{k}.{name}" for k in range(count) for name in layer}
    network = getattr(pipe, pipe.unet_name)
    names = [n for n in network.attn_processors if "motion_modules" not in n]
    cross = [n for n in names if not n.endswith("attn1.processor")]
    return {f"{2 * k + 1}.to_{part}_ip.weight" for k in range(len(cross)) for part in "kv"}


def load_ip_adapters(
    pipe: Any, paths: Sequence[Path], states: Sequence[State], scales: Sequence[float]
) -> None:
    """Load the tensors of adapters into a pipeline that has their image encoder.

    paths: of the files, for errors. Raises ModelError for tensors of other shapes, and for several
    adapters where the family takes one.
    """
    if _of_sd3(pipe):
        if len(states) > 1:
            raise ModelError(
                f"{type(pipe).__name__} takes one IP-Adapter, not {len(states)}; give ip_adapter "
                "(--ip-adapter) once."
            )
        with quiet():
            load_or_refuse(paths[0], lambda: pipe.load_ip_adapter(
                states[0], image_encoder_folder=None
            ))  # fmt: skip
        pipe.set_ip_adapter_scale(scales[0])
        return
    none = [""] * len(states)  # everything is read already
    options: dict[str, Any] = {"subfolder": none, "weight_name": none}
    if not _of_flux(pipe):
        options["image_encoder_folder"] = None
    with quiet():
        load_or_refuse(paths[0], lambda: pipe.load_ip_adapter([*states], **options))
    pipe.set_ip_adapter_scale([*scales] if len(scales) > 1 or not _of_flux(pipe) else scales[0])


def register_encoder(pipe: Any, folder: Path) -> None:
    """Give a pipeline the image encoder of an adapter where it has none.

    Raises ModelError for a folder that lacks weights of the family's encoder.
    """
    from transformers import CLIPVisionModelWithProjection, SiglipImageProcessor, SiglipVisionModel

    if getattr(pipe, "image_encoder", None) is not None:
        return
    cls: Any = SiglipVisionModel if _of_sd3(pipe) else CLIPVisionModelWithProjection
    options = {"use_safetensors": True, "local_files_only": True, "dtype": pipe.dtype}
    with quiet(), refuse_missing_weights(folder):
        encoder = load_or_refuse(folder, lambda: cls.from_pretrained(str(folder), **options))
    pipe.register_modules(image_encoder=encoder)
    if _of_sd3(pipe) and getattr(pipe, "feature_extractor", None) is None:
        side = encoder.config.image_size
        pipe.register_modules(
            feature_extractor=SiglipImageProcessor(size={"height": side, "width": side})
        )


def _of_sd3(pipe: Any) -> bool:
    from diffusers.loaders.ip_adapter import SD3IPAdapterMixin

    return isinstance(pipe, SD3IPAdapterMixin)


def _of_flux(pipe: Any) -> bool:
    from diffusers.loaders.ip_adapter import FluxIPAdapterMixin

    return isinstance(pipe, FluxIPAdapterMixin)
