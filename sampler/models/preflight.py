"""Checks of a model folder before any model library opens it. Imports no torch.

A folder in the diffusers layout names classes, and the libraries import what it names. So only
classes of diffusers and transformers are let through, no Python file may lie where the libraries
would look for one, no configuration may point at code elsewhere, and weights must be safetensors,
which hold numbers only. Everything refused is a SamplerError (6) of one sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sampler.core.errors import ModelError, SamplerError, first_line
from sampler.models.folder import INDEX
from sampler.models.vocabulary import check_vocabulary
from sampler.models.weights import PICKLES, stem_of, weight_files

MAX_INDEX = 2**18  # bytes; real ones have a few hundred
MAX_CONFIG = 2**24  # bytes; a tokenizer_config.json with many added tokens has a few hundred KB
MAX_DEPTH = 64

_LIBRARIES = ("diffusers", "transformers")
_POINTER = b"version https://git-lfs"
CONFIG = "config.json"
_NO_WEIGHTS = re.compile(r"(Tokenizer|Scheduler|Processor|FeatureExtractor)(Fast|Pil)?$")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_FOREIGN_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
_KERNEL_KEYS = ("_implementation", "use_kernels", "kernel_config", "hub_kernel")
_PLAIN_NAME = re.compile(r"[a-z0-9_]+")
_PLAIN = re.compile(r"[a-z0-9_|]*")


def check(
    folder: Path, variant: str | None = None, needs: Callable[[str], bool] = lambda name: True
) -> tuple[str, dict[str, tuple[str, str]]]:
    """(pipeline class, {component: (library, class)}) of a complete and safe folder.

    variant: of the weights; needs: False for components whose weights come from elsewhere. Raises
    ModelError, naming what is wrong and what to do about it.
    """
    index = _index(folder)
    _no_code(folder)
    parts: dict[str, tuple[str, str]] = {}
    for name, (library, cls) in _components(folder, index).items():
        if not isinstance(library, str) or not (library in _LIBRARIES or _is_own(library)):
            raise _refused(
                folder, f"its component {name!r} comes from {library!r:.60}, not from diffusers "
                "or transformers"
            )  # fmt: skip
        if not isinstance(cls, str) or not _NAME.fullmatch(cls):
            raise _refused(folder, f"the class of its component {name!r} is {cls!r:.60}")
        if not (folder / name).is_dir():
            raise ModelError(f"{folder} is incomplete: the folder {name} is missing.")
        parts[name] = _library_of(folder / name, library), cls
    for name, (library, cls) in parts.items():
        if has_weights(cls):
            check_component(folder / name, library, variant, needs(name))
        else:
            _check_files(folder / name)
            _check_tools(folder, name, cls, parts)
    return index["_class_name"], parts


def _is_own(library: str) -> bool:
    """True for a pipeline folder of diffusers itself, whose class brings parts of its own."""
    spec = find_spec("diffusers")
    if spec is None or spec.origin is None or not _PLAIN_NAME.fullmatch(library):
        return False
    return (Path(spec.origin).parent / "pipelines" / library / "__init__.py").is_file()


def _library_of(folder: Path, library: str) -> str:
    """The library whose file names a component has; parts of pipelines are of either kind."""
    if library in _LIBRARIES:
        return library
    own = any(path.name.startswith(stem_of("diffusers")) for path in folder.iterdir())
    return "diffusers" if own else "transformers"


def has_weights(cls: str) -> bool:
    """True for the class of a network; False for schedulers, tokenizers and processors."""
    return not _NO_WEIGHTS.search(cls)


def check_component(
    folder: Path, library: str = "diffusers", variant: str | None = None, weights: bool = True
) -> None:
    """Check the folder of one network; weights: False where only its configuration is read.

    Raises ModelError.
    """
    _check_files(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is incomplete: {CONFIG} is missing.")
    for path in weight_files(folder, library, variant) if weights else ():
        if path.suffix == ".safetensors":
            stored_dtype(path)


def _check_files(folder: Path) -> None:
    """Raise ModelError for code, and for configurations that refer to code or cannot be read."""
    if not folder.is_dir():
        raise ModelError(f"{folder} does not exist, or is not a folder.")
    _no_code(folder)
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith("config.json") or ".index." in path.name:
            _check_config(path)


def _check_tools(folder: Path, name: str, cls: str, parts: Mapping[str, Any]) -> None:
    """Raise ModelError for a scheduler without configuration or a tokenizer without vocabulary."""
    for path in sorted((folder / name).iterdir()):
        if path.is_file():
            refuse_pointer(path)
    if name.startswith("tokenizer"):
        encoder = name.replace("tokenizer", "text_encoder")
        check_vocabulary(folder / name, folder / encoder if encoder in parts else None)
        return
    wanted = "scheduler_config.json" if "Scheduler" in cls else "*config.json"
    if not any((folder / name).glob(wanted)):
        raise ModelError(f"{folder / name} is incomplete: {wanted.strip('*')} is missing.")


def refuse_pointer(path: Path) -> None:
    """Raises ModelError for the stand-in that Git leaves for a large file."""
    with path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise ModelError(
                f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`."
            )


def refuse_pickle(path: Path) -> None:
    """Raises ModelError for a file that can run code when it is opened."""
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path} is a pickle, which can run code, and is refused; convert it to safetensors."
        )


def stored_dtype(path: Path) -> str:
    """The safetensors type of a file's first tensor ("F32", "F16", "BF16", ...).

    Reads the header only. Raises SamplerError (6) where header and file do not fit.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    refuse_pointer(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return file.get_slice(names[0]).get_dtype() if names else "F32"
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not an intact safetensors file: {first_line(error):.120}."
        ) from None


def _index(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise ModelError(f"{folder} does not exist.")
    path = folder / INDEX
    if folder.is_file():
        raise ModelError(
            f"{folder} is not a diffusers pipeline: it is a file; a model is a folder with "
            f"{INDEX}, or a .safetensors file."
        )
    if not path.is_file():
        raise ModelError(f"{folder} is not a diffusers pipeline: it has no {INDEX}.")
    index = _json(path, MAX_INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refused(folder, f"its pipeline class is {name!r:.60}, not a name of diffusers")
    _no_foreign_keys(path, index)
    return index


def _components(folder: Path, index: dict[str, Any]) -> dict[str, list[Any]]:
    """The components that are there; other entries are the pipeline's own settings."""
    found: dict[str, list[Any]] = {}
    for key, value in index.items():
        if key.startswith("_") or not isinstance(value, (list, dict)):
            continue
        if not isinstance(value, list) or len(value) != 2 or not _NAME.fullmatch(key):
            raise _refused(folder, f"the entry {key!r:.60} of its {INDEX} is not [library, class]")
        if value != [None, None]:
            found[key] = value
    return found


def _no_code(folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".py", ".pyc"))
    if found:
        raise _refused(folder, f"it brings its own code ({found[0]})")


def _check_config(path: Path) -> None:
    config = _json(path, MAX_CONFIG)
    _no_foreign_keys(path, config)
    for key, value in _walk(path, config):
        if any(word in key for word in _KERNEL_KEYS):
            texts = [value] if isinstance(value, str) else [t for _, t in _walk(path, value)]
            if any(isinstance(t, str) and not _PLAIN.fullmatch(t) for t in texts):
                raise _refused(path, f"its key {key!r:.60} names code to be fetched")


def _no_foreign_keys(path: Path, config: Any) -> None:
    for key, value in _walk(path, config):
        if key in _FOREIGN_KEYS and value not in (None, False):
            raise _refused(path, f"its key {key!r} refers to foreign code")


def _walk(path: Path, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of a JSON tree; items of lists have the key ""."""
    if depth > MAX_DEPTH:
        raise ModelError(f"{path} is nested too deeply.")
    pairs = (
        value.items()
        if isinstance(value, dict)
        else (("", item) for item in value)
        if isinstance(value, list)
        else ()
    )
    for key, item in pairs:
        yield key, item
        yield from _walk(path, item, depth + 1)


def _json(path: Path, limit: int) -> dict[str, Any]:
    refuse_pointer(path)
    try:
        if path.stat().st_size > limit:
            raise ModelError(f"{path} is larger than {limit} bytes.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {first_line(error):.120}.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object.")
    return value


def _refused(path: Path, why: str) -> SamplerError:
    return ModelError(f"{path} is refused: {why}; nothing of it was run.")
