"""Finished images to evaluate: those of a run folder, or of a folder of unknown origin."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sampler.core.errors import SamplerError, UsageError
from sampler.runs.encodings import PARAMETERS, RECORD, decode
from sampler.runs.folder import RUN, RunFolder
from sampler.runs.readers import read_jsonl
from sampler.runs.store import LocalStore, open_store

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"  # of the datasets library: {"file_name": ..., "text": ...}
_TEXTS = ("prompt", "text", "caption")
_UI = re.compile(r"\n(?:Negative prompt:|Steps: )")
_UI_SEED = re.compile(r"\bSeed: (\d+)")


@dataclass(frozen=True)
class Picture:
    """One image. prompt, seed: None where they are not known; meta: of its prompt line."""

    name: str
    digest: str
    prompt: str | None
    seed: int | None
    read: Callable[[], bytes]
    nfe: int | None = None
    ms: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def cluster(self) -> str:
        """Return the prompt, which its repeats share, or else its own name."""
        return self.name if self.prompt is None else self.prompt

    @property
    def pair(self) -> tuple[str, int | str]:
        """Return what the same image of another setting shares: prompt and seed.

        The name stands for a seed that is not known.
        """
        return self.cluster, self.name if self.seed is None else self.seed


@dataclass(frozen=True)
class PictureSet:
    """Images by (prompt, seed, name), the known settings behind them, and notes for the user.

    folder: where scores are kept; None where nothing may be written.
    """

    where: str
    pictures: tuple[Picture, ...]
    facts: dict[str, Any]
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def prompts(self) -> list[str]:
        """Distinct prompts, sorted."""
        return sorted({p.prompt for p in self.pictures if p.prompt is not None})


def open_pictures(where: str | Path) -> PictureSet:
    """Open the images of a run folder or its URL, or all image files below a folder.

    Raises UsageError for a place without images.
    """
    store = open_store(where)
    if not isinstance(store, LocalStore) or store.read(RUN) is not None:
        return _of_run(RunFolder(store))
    if not store.root.is_dir():
        raise UsageError(f"{where} is not a folder: give a run folder or a folder of images.")
    return _of_folder(store.root)


def _sorted(pictures: Iterator[Picture], where: str) -> tuple[Picture, ...]:
    found = sorted(pictures, key=lambda p: (p.prompt or "", p.seed or 0, p.name))
    if not found:
        raise UsageError(f"{where} holds no finished image (PNG, JPEG or WebP).")
    return tuple(found)


def _of_run(run: RunFolder) -> PictureSet:
    results, sizes = run.results().entries, run.store.sizes()

    def found() -> Iterator[Picture]:
        for job in run.jobs():
            entry = results.get(job.key, {})
            if entry.get("status") == "ok" and entry["file"] in sizes:
                yield Picture(
                    entry["file"], entry["sha256"], job.prompt, job.seed,
                    partial(_stored, run, entry["file"]), entry.get("nfe"), entry.get("ms"),
                    job.meta,
                )  # fmt: skip

    pictures = _sorted(found(), run.store.where)
    notes = []
    if left := run.total - len(pictures):
        notes.append(f"{left} of {run.total} images of {run.store.where} are missing or failed")
    if len(run.groups) > 1:
        notes.append(
            f"{run.store.where} holds {len(run.groups)} settings, whose scores are averaged; "
            "compare settings as runs of their own with --against"
        )
    first, facts = run.groups[0], json.loads(run.store.read(RUN) or b"{}")
    made = {
        "model": run.model.label,
        "fingerprint": run.model.fingerprint,
        "options": dict(run.model.options),
        "dtype": sorted({e["dtype"] for e in results.values() if "dtype" in e}),
        "device": run.config.get("model", {}).get("device", "as loaded"),
        "settings": len(run.groups),
        "steps": first.steps,
        "height": first.height,
        "width": first.width,
        "sampler": dict(first.sampler),
        "guidance": dict(first.guidance),
        **({} if first.grid is None else {"grid": first.grid}),
        "versions": facts.get("versions", {}),
    }
    folder = run.store.root if isinstance(run.store, LocalStore) else None
    return PictureSet(run.store.where, pictures, made, folder, tuple(notes))


def _stored(run: RunFolder, name: str) -> bytes:
    data = run.store.read(name)
    if data is None:
        raise UsageError(f"{run.store.where}/{name} is missing; `sampler resume` regenerates it.")
    return data


def _of_folder(root: Path) -> PictureSet:
    rows = _metadata(root)

    def found() -> Iterator[Picture]:
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            name, data = path.relative_to(root).as_posix(), path.read_bytes()
            if any(part.startswith(".") for part in Path(name).parts):
                continue
            prompt, seed = rows.pop(name, None) or _own_prompt(path, data)
            digest = hashlib.sha256(data).hexdigest()
            yield Picture(name, digest, prompt, seed, path.read_bytes)

    pictures = _sorted(found(), str(root))
    if rows:
        raise UsageError(f"{root / METADATA}: there is no image {min(rows)!r:.80}.")
    unknown = sum(p.prompt is None for p in pictures)
    notes = (f"the prompt of {unknown} of {len(pictures)} images is not known",) if unknown else ()
    return PictureSet(str(root), pictures, {"model": "unknown"}, None, notes)


def _metadata(root: Path) -> dict[str, tuple[str, int | None]]:
    """(prompt, seed) by file name, of the folder's metadata.jsonl."""
    path, found = root / METADATA, {}
    if not path.is_file():
        return found
    with path.open("rb") as stream:
        for where, cells, *_ in read_jsonl(stream, METADATA):
            if isinstance(cells, SamplerError):
                raise cells
            text = next((cells[key] for key in _TEXTS if key in cells), None)
            name, seed = cells.get("file_name"), cells.get("seed")
            if not isinstance(name, str) or not isinstance(text, str):
                raise UsageError(
                    f"{where}: a row needs the texts file_name and prompt (or text, caption)."
                )
            found[Path(name).as_posix()] = (text, seed if isinstance(seed, int) else None)
    return found


def _own_prompt(path: Path, data: bytes) -> tuple[str | None, int | None]:
    """(prompt, seed) of a text file beside an image, or of the texts that generators embed."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8", errors="replace").strip() or None, None
    try:
        texts = decode(data)[1]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if RECORD in texts:
        try:
            record = json.loads(texts[RECORD])["record"]
            return str(record["prompt"]), int(record["seed"])
        except (ValueError, KeyError, TypeError):
            pass
    if PARAMETERS in texts:
        text = texts[PARAMETERS]
        seed = _UI_SEED.search(text)
        return _UI.split(text)[0].strip() or None, int(seed[1]) if seed else None
    return None, None
