"""Prompts and seeds of images of unknown origin: in tables and texts beside them, or inside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sampler.core.errors import SamplerError, UsageError
from sampler.runs.cells import given, scalar
from sampler.runs.encodings import PARAMETERS, RECORD, decode
from sampler.runs.tables import read_table

# Tables of the datasets library: {"file_name": ..., "text": ...}
METADATA, TABLES = "metadata", (".jsonl", ".csv", ".tsv", ".parquet")
_TEXTS = ("prompt", "text", "caption")
_UI = re.compile(r"\n(?:Negative prompt:|Steps: )")
_UI_SEED = re.compile(r"\bSeed: (\d+)")


class Caption(NamedTuple):
    """Prompt and seed of an image. where: their place; meta: columns meta_* of a row."""

    where: str
    prompt: str | None
    seed: int | None
    meta: Mapping[str, Any] = {}


def captions_below(root: Path) -> tuple[dict[str, Caption], list[str]]:
    """Return captions by file name, of all tables `metadata` below a folder, and notes on columns
    that are not read.

    Raises UsageError for rows that do not fit.
    """
    found: dict[str, Caption] = {}
    notes: list[str] = []
    for path in sorted(root.rglob(f"{METADATA}.*")):
        if path.suffix not in TABLES or not path.is_file():
            continue
        unread = dict[str, None]()
        for raw in read_table(path):
            cells = raw.cells
            if isinstance(cells, SamplerError):
                raise cells
            text = next((key for key in _TEXTS if key in cells), "")
            file, prompt = cells.get("file_name"), cells.get(text)
            if not isinstance(file, str) or not isinstance(prompt, str):
                raise UsageError(
                    f"{raw.where}: a row needs the texts file_name and prompt (or text, caption)."
                )
            name = Path(os.path.normpath(path.parent.relative_to(root) / file)).as_posix()
            if name in found:
                raise UsageError(f"{raw.where}: {name!r:.80} has a row already.")
            meta = {k: scalar(v) if raw.text else v for k, v in cells.items() if k[:5] == "meta_"}
            found[name] = Caption(raw.where, prompt, _seed(cells.get("seed"), raw.where), meta)
            unread |= dict.fromkeys(k for k in cells if k not in ("file_name", text, "seed", *meta))
        if unread:
            notes.append(f"columns of {path} that are not read: {', '.join(unread)}")
    return found, notes


def _seed(cell: Any, where: str) -> int | None:
    """Seed of a row. Raises UsageError."""
    if cell in (None, ""):
        return None
    seed = given(cell, "seed", where)
    if isinstance(seed, str) and seed.strip().isdecimal():
        return int(seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"{where}: seed must be an integer of at least 0, not {cell!r:.40}.")
    return seed


def caption_of(path: Path, data: bytes) -> Caption:
    """Return what a text file beside an image says, or the texts that generators embed.

    Raises UsageError for a text file that is not UTF-8.
    """
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            text = beside.read_text(encoding="utf-8-sig").strip()
            return Caption(str(beside), text or None, None)
        except UnicodeDecodeError:
            raise UsageError(f"{beside}: not UTF-8 text.") from None
    texts = decode(data, str(path))[1]
    if RECORD in texts:
        try:
            record = json.loads(texts[RECORD])["record"]
            return Caption(str(path), str(record["prompt"]), int(record["seed"]))
        except (ValueError, KeyError, TypeError):
            pass
    if PARAMETERS in texts:
        text = texts[PARAMETERS]
        seed = _UI_SEED.search(text)
        prompt = _UI.split(text)[0].strip() or None
        return Caption(str(path), prompt, int(seed[1]) if seed else None)
    return Caption(str(path), None, None)
