"""Finished images to evaluate: those of a run folder, or of a folder of unknown origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sampler.core.errors import UsageError
from sampler.core.image_files import has_alpha, open_image
from sampler.evaluation.captions import caption_of, captions_below
from sampler.runs.folder import RUN, RunFolder
from sampler.runs.store import LocalStore, open_store

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


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
            if entry.get("status") == "ok" and sizes.get(entry["file"]) == entry["bytes"]:
                yield Picture(
                    entry["file"], entry["sha256"], job.prompt, job.seed,
                    partial(_stored, run, entry["file"]), entry.get("nfe"), entry.get("ms"),
                    job.meta,
                )  # fmt: skip

    pictures = _sorted(found(), run.store.where)
    notes = []
    if left := run.total - len(pictures):
        notes.append(
            f"{left} of {run.total} images of {run.store.where} are missing, changed or failed"
        )
    looks = _Looks()
    looks.at(pictures[0].read(), pictures[0].name)  # a run has one kind
    if looks.moving:
        notes.append(f"{run.store.where} holds videos, whose first frames are scored")
    if looks.clear:
        notes.append(f"images of {run.store.where} have alpha: they are scored on white")
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
    rows, notes = captions_below(root)
    looks = _Looks()

    def found() -> Iterator[Picture]:
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if any(part.startswith(".") for part in Path(name).parts) or not looks.is_read(path):
                continue
            data = path.read_bytes()
            looks.at(data, str(path))
            row = rows.pop(name, None) or caption_of(path, data)
            digest = hashlib.sha256(data).hexdigest()
            yield Picture(name, digest, row.prompt, row.seed, path.read_bytes, meta=row.meta)

    pictures = _sorted(found(), str(root))
    for name, row in rows.items():
        raise UsageError(f"{row.where}: there is no image {name!r:.80}.")
    if unknown := sum(p.prompt is None for p in pictures):
        notes.append(f"the prompt of {unknown} of {len(pictures)} images is not known")
    if runs := sorted(path.parent.relative_to(root).as_posix() for path in root.rglob(RUN)):
        names = ", ".join(runs[:3]) + (", ..." if len(runs) > 3 else "")
        notes.append(f"{root} holds {len(runs)} run folders, scored as one set: {names}")
    return PictureSet(
        str(root), pictures, {"model": "unknown"}, None, (*notes, *looks.notes(str(root)))
    )


@dataclass
class _Looks:
    """Files that are left out, and images that are not scored as they look."""

    left: list[str] = field(default_factory=list[str])
    moving: int = 0
    clear: int = 0
    seen: int = 0

    def is_read(self, path: Path) -> bool:
        """Return True for an image file; remember other images, and links that lead nowhere."""
        from PIL import Image

        if path.suffix.lower() in SUFFIXES and path.is_file():
            return True
        is_image = path.suffix.lower() in Image.registered_extensions() and not path.is_dir()
        if is_image or (path.is_symlink() and not path.is_file()):
            self.left.append(path.name)
        return False

    def at(self, data: bytes, name: str) -> None:
        """Look at an image. Raises UsageError for a file that is not one."""
        with open_image(data, name) as image:
            self.seen += 1
            self.moving += getattr(image, "n_frames", 1) > 1
            if has_alpha(image):
                self.clear += image.convert("RGBA").getchannel("A").getextrema() != (255, 255)

    def notes(self, where: str) -> list[str]:
        found = []
        if self.left:
            names = ", ".join(self.left[:3]) + (", ..." if len(self.left) > 3 else "")
            found.append(
                f"{len(self.left)} left out of {where}: {names}; PNG, JPEG and WebP files are "
                "read, and links to folders are not followed"
            )
        if self.moving:
            found.append(f"{self.moving} of {self.seen} images move: their first frames are scored")
        if self.clear:
            found.append(f"{self.clear} of {self.seen} images have alpha: they are scored on white")
        return found
