"""IP-Adapters from files: image prompts for the cross-attention of a loaded pipeline.

    Z = Attention(Q, K, V) + scale·Attention(Q, K', V')     K', V': of the image's embedding

Ye et al., 2023, arXiv:2308.06721, eq. 5. A file holds K' and V' of every cross-attention layer and
the projection of the embedding; the image encoder is a folder beside it, as in the published
layout: DIR/ip-adapter_NAME.safetensors and DIR/image_encoder, or models/image_encoder next to DIR.
Imports torch only to read tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampler.core.errors import ModelError
from sampler.models.folder import component_config
from sampler.models.ip_adapter_layers import (
    load_ip_adapters,
    register_encoder,
    takes_ip_adapters,
    tensors_of,
    usual_name,
)
from sampler.models.preflight import check_component, refuse_pickle, stored_dtype

IP_ADAPTER = "An IP-Adapter"  # in errors
# Weight of a projection, and the field of the encoder's configuration with its input width.
_WIDTHS = (
    ("image_proj.proj.weight", "projection_dim"),
    ("image_proj.proj_in.weight", "hidden_size"),
    ("image_proj.proj.0.weight", "hidden_size"),
)


@dataclass(frozen=True)
class IPAdapterFiles:
    """File with the weights of an IP-Adapter, and the folder of its image encoder."""

    weights: Path
    encoder: Path


def ip_adapter_files(source: Path) -> IPAdapterFiles:
    """The files of an IP-Adapter given as its file, or as a folder with one.

    Raises ModelError for a pickle, a folder with several files, a file that is not an IP-Adapter or
    one for faces, and where no image encoder fits.
    """
    weights = _weights(source)
    shapes = _shapes(weights)
    found = next(((shapes[key][-1], field) for key, field in _WIDTHS if key in shapes), None)
    if not any(key.startswith("ip_adapter.") for key in shapes):
        raise ModelError(f"{weights} is not an IP-Adapter: it has no tensors named ip_adapter.")
    if found is None or {"image_proj.norm.weight", "image_proj.proj.0.weight"} <= set(shapes):
        raise ModelError(
            f"{weights} is an IP-Adapter for the embeddings of faces (FaceID), which are not "
            "computed here; use one for images."
        )
    folder = weights.parent
    places = [folder / "image_encoder", folder.parent / "models" / "image_encoder"]
    for encoder in (place for place in places if place.is_dir()):
        if component_config(encoder.parent, encoder.name).get(found[1]) == found[0]:
            check_component(encoder, "transformers")
            return IPAdapterFiles(weights, encoder)
    raise ModelError(
        f"{weights} has no image encoder whose {found[1]} is {found[0]}; put its folder at "
        f"{places[0]}."
    )


def apply_ip_adapters(pipe: Any, given: Sequence[tuple[Path, float]]) -> None:
    """Load IP-Adapters, each with its scale, and their image encoder into a pipeline.

    Raises ModelError for a pipeline without such layers, and for adapters of another network.
    """
    if not takes_ip_adapters(pipe):
        raise ModelError(
            f"{type(pipe).__name__} takes no IP-Adapter; leave ip_adapter (--ip-adapter) out."
        )
    files = [ip_adapter_files(path) for path, _ in given]
    states = [_state(one.weights) for one in files]
    wanted = tensors_of(pipe)
    for one, state in zip(files, states, strict=True):
        if set(state["ip_adapter"]) != wanted:
            raise ModelError(
                f"{one.weights} is an IP-Adapter of another network: it has "
                f"{len(state['ip_adapter'])} tensors, and {len(wanted)} are needed."
            )
    register_encoder(pipe, files[0].encoder)
    weights, scales = [one.weights for one in files], [scale for _, scale in given]
    load_ip_adapters(pipe, weights, states, scales)


def has_ip_adapter(pipe: Any) -> bool:
    """Return True for a pipeline whose network has image prompts loaded."""
    from diffusers.models.embeddings import MultiIPAdapterImageProjection

    networks = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    return any(
        isinstance(getattr(network, "encoder_hid_proj", None), MultiIPAdapterImageProjection)
        or getattr(network, "image_proj", None) is not None
        for network in networks
    )


def _weights(source: Path) -> Path:
    refuse_pickle(source)
    if source.is_file():
        return source
    if not source.is_dir():
        raise ModelError(f"{source} does not exist.")
    found = sorted(source.glob("*.safetensors"))
    if len(found) != 1:
        what = "no safetensors file" if not found else f"{len(found)} safetensors files"
        raise ModelError(f"{source} holds {what}; name the file of the IP-Adapter.")
    return found[0]


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a file, from its header."""
    from safetensors import safe_open

    stored_dtype(path)
    with safe_open(path, framework="numpy") as file:
        return {usual_name(n): file.get_slice(n).get_shape() for n in file.keys()}


def _state(path: Path) -> dict[str, dict[str, Any]]:
    """Tensors of a file in the two parts that diffusers takes. Raises ModelError for others."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(path).items():
        part, _, rest = usual_name(name).partition(".")
        if part not in found:
            raise ModelError(f"{path}: {name!r:.80} is not a tensor of an IP-Adapter.")
        found[part][rest] = tensor
    return found
