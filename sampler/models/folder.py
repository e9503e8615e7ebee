"""Folder of a pipeline: its path, and values of its configurations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sampler.bundled import (
    BUNDLED,
    BUNDLED_FLOW,
    BUNDLED_LCM,
    BUNDLED_SCALE,
    BUNDLED_SD3,
    BUNDLED_STUDENT,
)
from sampler.core.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INDEX = "model_index.json"
# Families whose defaults are known without loading them, with the guidance scale of the stock
# pipeline (tested against diffusers). Other families need the loaded model.
SCALES = {
    "StableDiffusionPipeline": 7.5,
    "StableDiffusionXLPipeline": 5.0,
    "PixArtAlphaPipeline": 4.5,
    "PixArtSigmaPipeline": 4.5,
}


def find(source: str | Path, revision: str | None = None) -> Path:
    """The path of a model: as given, or in the local cache of the Hugging Face Hub.

    A path that does not exist and is not the name of a Hub model is returned unchanged. Raises
    ModelError for a Hub model that is not in the cache.
    """
    path = Path(source).expanduser()
    if path.exists() or not HUB_ID.fullmatch(str(source)):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, local_files_only=True))
    except Exception:
        raise ModelError(
            f"{source} is neither a folder here nor in the local cache; give download=True "
            "(--download) to fetch it from the Hugging Face Hub."
        ) from None


def pipeline_class(folder: Path) -> str:
    """Class name of the pipeline, "None" without an index."""
    return str(read_json(folder / INDEX).get("_class_name"))


def default_strategies(
    path: str | None, revision: str | None = None, config: str | None = None
) -> dict[str, Any] | None:
    """Default sampler and guidance of a model, those of `sampler.load`; arguments as there.

    None where they are known only after a load.
    """
    if path in (None, BUNDLED, BUNDLED_FLOW, BUNDLED_SD3):
        return {"sampler": {"name": "ddim"}, "guidance": {"name": "cfg", "scale": BUNDLED_SCALE}}
    if path == BUNDLED_STUDENT:
        return {"sampler": {"name": "consistency"}, "guidance": {"name": "student"}}
    if path == BUNDLED_LCM:
        return None
    folder = find(path, revision) if config is None else Path(config).expanduser()
    if not _is_plain(folder):
        return None
    scale = SCALES[pipeline_class(folder)]
    return {"sampler": {"name": "ddim"}, "guidance": {"name": "cfg", "scale": scale}}


def _is_plain(folder: Path) -> bool:
    """True for a model of a family in SCALES, other than a few-step student."""
    scheduler = str(read_json(folder / INDEX).get("scheduler"))
    student = component_config(folder, "unet").get("time_cond_proj_dim") is not None
    return pipeline_class(folder) in SCALES and "LCM" not in scheduler and not student


def native_size(folder: Path) -> tuple[int, int] | None:
    """(height, width) of images at the network's training size; None outside of SCALES."""
    if pipeline_class(folder) not in SCALES:
        return None
    for name in ("unet", "transformer"):
        size = component_config(folder, name).get("sample_size")
        if size:
            height, width = (size, size) if isinstance(size, int) else size
            factor = vae_factor(folder)
            return height * factor, width * factor
    return None


def vae_factor(folder: Path, name: str = "vae") -> int:
    """Pixels per latent, along each side."""
    config = component_config(folder, name)
    blocks = config.get("block_out_channels") or config.get("decoder_block_out_channels")
    return 2 ** (len(blocks) - 1) if blocks else 8


def component_config(folder: Path, name: str) -> dict[str, Any]:
    """Configuration of a component, empty where it has none."""
    return read_json(folder / name / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty for a file that is missing or holds no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
