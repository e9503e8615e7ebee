"""Weight files of a component's folder, as diffusers and transformers choose among them.

    diffusion_pytorch_model.safetensors                       one file; transformers: model
    diffusion_pytorch_model.fp16.safetensors                  the variant fp16
    diffusion_pytorch_model-00001-of-00002.safetensors        shards, and their index:
    diffusion_pytorch_model.safetensors.index.json            ... .index.fp16.json of a variant

With both, diffusers takes the shards and transformers the single file. A component without files
of the variant is loaded without it. Imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from sampler.core.errors import ModelError
from sampler.models.folder import read_json

_FILE = r"{stem}(?:\.(?P<a>[^.]+?))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<b>[^.]+))?\.safetensors"
_INDEX = r"{stem}\.safetensors(?:\.(?P<a>[^.]+))?\.index(?:\.(?P<b>[^.]+))?\.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def stem_of(library: str) -> str:
    """Name of the weight files that a library writes."""
    return "diffusion_pytorch_model" if library == "diffusers" else "model"


def variants(folder: Path, library: str) -> dict[str | None, list[Path]]:
    """Weight files and indices by variant, those that are read; None is the plain one.

    Raises ModelError for shards without an index.
    """
    whole: dict[str | None, list[Path]] = {}
    shards: dict[str | None, list[Path]] = {}
    indices: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _match(_FILE, library, path):
            where = shards if match["shard"] else whole
        elif match := _match(_INDEX, library, path):
            where = indices
        else:
            continue
        where.setdefault(match["a"] or match["b"], []).append(path)
    for variant in shards.keys() - indices.keys() - whole.keys():
        raise ModelError(
            f"{shards[variant][0]} is one of several parts, and their index (...index.json) is "
            "missing."
        )
    parts = {variant: [path for index in indices[variant] for path in _indexed(index)]
             for variant in indices}  # fmt: skip
    return {**whole, **parts} if library == "diffusers" else {**parts, **whole}


def weight_files(folder: Path, library: str, variant: str | None = None) -> list[Path]:
    """Weight files and index that a load reads. Raises ModelError where there are none."""
    found = variants(folder, library)
    if chosen := found.get(variant) or found.get(None):
        return chosen
    if found:
        names = " or ".join(sorted(str(name) for name in found))
        if variant is not None:
            raise ModelError(
                f"{folder} has no weights of the variant {variant!r:.40}; it has {names}."
            )
        raise ModelError(
            f"{folder} has weights of the variant {names} only; give variant={names!r} "
            f"(--variant {names})."
        )
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES)
    if pickled:
        raise ModelError(
            f"{folder} has pickle weights only ({pickled[0]}), which can run code and are "
            "refused; convert them to safetensors."
        )
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    there = f" named {stem_of(library)}.safetensors; {other[0]} is not read" if other else ""
    raise ModelError(f"{folder} has no safetensors weights{there}.")


def _indexed(index: Path) -> list[Path]:
    """An index and the files that it names. Raises ModelError for one that is not beside it."""
    named = read_json(index).get("weight_map")
    names = named.values() if isinstance(named, dict) else ()
    for name in names:
        inside = isinstance(name, str) and Path(name).name == name
        if not inside or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise ModelError(f"{index} names weights that are not there: {name!r:.60}.")
    return [index, *(index.parent / name for name in sorted(set(names)))]


def _match(pattern: str, library: str, path: Path) -> re.Match[str] | None:
    return re.fullmatch(pattern.format(stem=stem_of(library)), path.name)
