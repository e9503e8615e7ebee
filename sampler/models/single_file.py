"""A pipeline from one safetensors file, as checkpoints are often passed around.

Such a file holds the weights of a whole pipeline in its original layout, or those of the network
alone. Configurations and tokenizers, and in the second case the other parts, come from a folder in
the diffusers layout of the same architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sampler.core.errors import ModelError
from sampler.models import preflight


def is_file(source: Any) -> bool:
    """Return whether a source is one file rather than a folder or a name on the Hub."""
    endings = (".safetensors", *preflight.PICKLES)
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() in endings


def read_single_file(path: Path, config: Any, options: dict[str, Any]) -> Any:
    """The pipeline; `config`: the folder; `options`: of `from_single_file`.

    Raises SamplerError (6) for a file that is missing, a pickle or broken, and without a folder.
    """
    preflight.refuse_pickle(path)
    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    preflight.stored_dtype(path)
    if config is None:
        raise ModelError(
            f"{path.name} holds weights only: give config = a folder in the diffusers layout of "
            "the same architecture.",
        )
    import diffusers

    folder = Path(config).expanduser()
    cls: Any = getattr(diffusers, preflight.check(folder), None)
    if cls is None or not hasattr(cls, "from_single_file"):
        raise ModelError(f"diffusers reads no single file of a pipeline like {folder}.")
    options = {"local_files_only": True, **options}
    if _is_whole(path):
        return cls.from_single_file(str(path), config=str(folder), **options)
    index = json.loads((folder / preflight.INDEX).read_text(encoding="utf-8"))
    name = "unet" if "unet" in index else "transformer"
    network: Any = getattr(diffusers, index[name][1])
    part = network.from_single_file(str(path), config=str(folder), subfolder=name, **options)
    return cls.from_pretrained(folder, use_safetensors=True, **{name: part}, **options)


def _is_whole(path: Path) -> bool:
    """Return whether a file has a VAE beside the network, in one of the original layouts."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return any(name.startswith(("first_stage_model.", "vae.")) for name in file.keys())
