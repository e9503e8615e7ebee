"""Model files that a load reads, found without loading them. Imports no torch.

    a folder       model_index.json, its components, the weights of one variant
    a single file  weights in one file, configurations and the rest in the folder `config`
    another VAE    a component's folder, or a single file in the original layout

Everything else in a folder (other variants, pickles, notes) has no effect and is `unused`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampler.bundled import BUNDLED_PARTS, bundled_folder
from sampler.core.errors import ModelError
from sampler.models import preflight
from sampler.models.folder import HUB_ID, INDEX, component_config, find, vae_factor
from sampler.models.weights import variants, weight_files

NETWORKS = ("unet", "transformer")
_TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # of tokenizers and processors


@dataclass(frozen=True)
class ModelSource:
    """A model and the options that select its files.

    folder: with the configurations; pipeline: its class; parts: {component: (library, class)};
    single: the file with the weights; whole: it holds all weights, not only the network's.
    """

    folder: Path
    pipeline: str
    parts: dict[str, tuple[str, str]]
    variant: str | None = None
    single: Path | None = None
    whole: bool = False
    vae: Path | None = None

    @property
    def network(self) -> str:
        """Name of the component that denoises."""
        return next(name for name in NETWORKS if name in self.parts)

    @property
    def network_file(self) -> Path:
        """A file with weights of the network."""
        if self.single is not None:
            return self.single
        library, _ = self.parts[self.network]
        return weight_files(self.folder / self.network, library, self.variant)[-1]

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yield (name, path) of every file that a load reads."""
        yield INDEX, self.folder / INDEX
        for name in sorted(self.parts):
            for path in self._component(name):
                yield path.relative_to(self.folder).as_posix(), path
        if self.single is not None:
            yield "single file", self.single

    def vae_files(self) -> Iterator[tuple[str, Path]]:
        """The same for the VAE that stands in for the pipeline's own."""
        if self.vae is not None and self.vae.is_dir():
            yield from ((path.name, path) for path in component_files(self.vae))
        elif self.vae is not None:
            yield "single file", self.vae

    def unused(self) -> list[str]:
        """Names of the files below the folder that a load does not read."""
        used = {path for _, path in self.files()}
        return [
            path.relative_to(self.folder).as_posix()
            for path in _below(self.folder)
            if path not in used and not path.name.startswith(".")
        ]

    def _component(self, name: str) -> Iterator[Path]:
        library, cls = self.parts[name]
        folder = self.folder / name
        if preflight.has_weights(cls):
            if name == "vae" and self.vae is not None and self.vae.is_dir():
                return
            yield folder / "config.json"
            replaced = self.whole or (self.single is not None and name == self.network)
            if not replaced and not (name == "vae" and self.vae is not None):
                yield from weight_files(folder, library, self.variant)
        else:
            yield from (path for path in _below(folder) if path.suffix in _TEXTS)


def component_files(folder: Path, library: str = "diffusers") -> list[Path]:
    """Files that a load reads of one component's folder. Raises ModelError without weights."""
    return [folder / "config.json", *weight_files(folder, library)]


def find_source(
    path: Any,
    *,
    config: Any = None,
    revision: str | None = None,
    variant: str | None = None,
    vae: Any = None,
) -> ModelSource:
    """The files of a model, checked to be present, complete and safe.

    path and options: of `sampler.load`. Raises ModelError for a model that is missing, unsafe or
    incomplete, and ValueError for an option that has no effect on it.
    """
    path = bundled_folder(path) if path is None or path in BUNDLED_PARTS else path
    root = _located(path, revision)
    one = is_file(root)
    if revision is not None and Path(path).expanduser().exists():
        raise ValueError("revision applies to models of the Hub only; leave it out.")
    if variant is not None and one:
        raise ValueError("variant applies to folders, not to a single file; leave it out.")
    if config is not None and not one:
        raise ValueError("config applies to a single file; a folder has its own.")
    other = None if vae is None else _checked_vae(Path(vae).expanduser())
    elsewhere = {*(NETWORKS if one else ()), *(("vae",) if other else ())}
    if one:
        folder = _single_file_config(root, config)
        whole = is_whole(root)
        name, parts = preflight.check(
            folder, None, lambda part: not whole and part not in elsewhere
        )
        source = ModelSource(folder, name, parts, None, root, whole, other)
    else:
        name, parts = preflight.check(root, variant, lambda n: n not in elsewhere)
        _check_variant(root, parts, variant)
        source = ModelSource(root, name, parts, variant, vae=other)
    if other is not None:
        _check_fit(source, other)
    return source


def is_file(source: Any) -> bool:
    """True for one file rather than a folder or a name on the Hub."""
    path = Path(source)
    return path.suffix.lower() in (".safetensors", *preflight.PICKLES) and not path.is_dir()


def is_whole(path: Path) -> bool:
    """True for a file with a VAE beside the network, in one of the original layouts."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return any(name.startswith(("first_stage_model.", "vae.")) for name in file.keys())


def _located(path: Any, revision: str | None) -> Path:
    if not str(path).strip():
        raise ModelError(
            "The name of the model is empty; give a folder, a .safetensors file or a Hub id."
        )
    found = find(path, revision)
    if not found.exists() and not HUB_ID.fullmatch(str(path)):
        raise ModelError(f"{path} does not exist.")
    return found


def _single_file_config(path: Path, config: Any) -> Path:
    """The folder of a single file's configurations. Raises ModelError."""
    preflight.refuse_pickle(path)
    preflight.stored_dtype(path)
    if config is None:
        raise ModelError(
            f"{path.name} holds weights only: give config (--model-config) = a folder in the "
            "diffusers layout of the same architecture."
        )
    return Path(config).expanduser()


def _check_variant(folder: Path, parts: dict[str, tuple[str, str]], variant: str | None) -> None:
    """Raise ModelError where no component has weights of the variant."""
    if variant is None:
        return
    there: set[str] = set()
    for name, (library, cls) in parts.items():
        for path in (folder / name).iterdir():
            if "." not in path.name:  # diffusers looks for the variant behind a dot in every name
                raise ModelError(f"{path} stops diffusers from reading a variant; move it away.")
        if preflight.has_weights(cls):
            there |= {str(v) for v in variants(folder / name, library) if v is not None}
    if variant not in there:
        has = f"it has {', '.join(sorted(there))}" if there else "it has none"
        raise ModelError(f"{folder} has no weights of the variant {variant!r:.40}; {has}.")


def _checked_vae(path: Path) -> Path:
    """A VAE's folder (or the folder `vae` in it), or a file. Raises ModelError."""
    if path.is_dir():
        folder = path / "vae" if (path / INDEX).is_file() else path
        preflight.check_component(folder)
        return folder
    if not path.exists():
        raise ModelError(f"The VAE {path} does not exist.")
    preflight.refuse_pickle(path)
    preflight.stored_dtype(path)
    return path


def _check_fit(source: ModelSource, vae: Path) -> None:
    """Raise ModelError where the latents of another VAE have another shape."""
    if "vae" not in source.parts:
        raise ModelError(f"{source.pipeline} has no VAE to be replaced; leave vae out.")
    if not vae.is_dir():
        return
    own, other = component_config(source.folder, "vae"), component_config(vae, "")
    for what, one, two in (
        ("channels", own.get("latent_channels"), other.get("latent_channels")),
        ("pixels per latent", vae_factor(source.folder), vae_factor(vae, "")),
    ):
        if one != two:
            raise ModelError(
                f"The VAE {vae} does not fit: its latents have {two} {what}, the model's {one}."
            )


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root) / name for name in sorted(names))
