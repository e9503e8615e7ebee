"""Lists of images and captions: folders, and tables of file names."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sampler.core.errors import SamplerError, UsageError, first_line
from sampler.runs.tables import read_table

LATENTS = ".safetensors"
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
NAMES = ("file_name", "image", "path")
CAPTIONS = ("text", "caption", "prompt")


class Item(NamedTuple):
    """An image file and its caption."""

    path: Path
    caption: str


def listed(source: str, caption: str | None = None) -> list[Item]:
    """Return the images of a folder or a table, in its order; a folder's by name.

    Columns that are not used are told as a warning. Raises UsageError for a data set without
    images, a row without a file, and an image without a caption where `caption` is None.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        tables = [t for t in (path / f"metadata{suffix}" for suffix in TABLES) if t.is_file()]
        items = _table(tables[0], caption) if tables else _folder(path, caption)
    elif path.suffix.lower() in TABLES and path.is_file():
        items = _table(path, caption)
    else:
        raise unreadable(source, "it does not exist" if not path.exists() else "unknown suffix")
    if not items:
        raise UsageError(f"data = {source} has no images ({', '.join(IMAGES)}).")
    return items


def unreadable(source: str, error: object) -> UsageError:
    """The error of a data set that cannot be read."""
    return UsageError(
        f"data = {source} is neither a folder of images, a table ({', '.join(TABLES)}) nor a file "
        f"of latents with their captions ({LATENTS}): {error}."
    )


def _folder(folder: Path, caption: str | None) -> list[Item]:
    """Return the images of a folder, with the text of NAME.txt as caption of NAME.png."""
    items: list[Item] = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES):
        beside = path.with_suffix(".txt")
        text = beside.read_text(encoding="utf-8").strip() if beside.is_file() else caption
        items.append(Item(path, _given(text, f"{path}", f"write {beside.name} beside it")))
    return items


def _table(table: Path, caption: str | None) -> list[Item]:
    """Return the rows of a table; the files are relative to its folder."""
    items: list[Item] = []
    unused: set[str] = set()
    for where, cells in _rows(table):
        row = {str(key).strip(): value for key, value in cells.items()}
        file = next((row[name] for name in NAMES if name in row), None)
        if not isinstance(file, str) or not file.strip():
            raise UsageError(
                f'{table} must have {{"file_name": ..., "text": ...}} per row: {where} has none.'
            )
        text = next((row[name] for name in CAPTIONS if name in row), None)
        text = caption if text is None or not str(text).strip() else str(text).strip()
        unused |= set(row) - {*NAMES, *CAPTIONS}
        items.append(Item(table.parent / file.strip(), _given(text, where, "fill in text")))
    if unused:
        warnings.warn(f"{table}: not used: columns {', '.join(sorted(unused))}.", stacklevel=4)
    return items


def _given(text: str | None, where: str, what: str) -> str:
    if text is None:
        raise UsageError(f"{where}: the image has no caption; {what}, or give one as caption.")
    return text


def _rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ("file:row", cells by column)."""
    if table.suffix.lower() in (".csv", ".tsv"):
        yield from _separated(table)
        return
    for where, cells, *_ in read_table(table):
        if isinstance(cells, SamplerError):
            raise cells
        yield where, cells


def _separated(table: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    delimiter = "," if table.suffix.lower() == ".csv" else "\t"
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            for number, cells in enumerate(csv.DictReader(file, delimiter=delimiter), 2):
                if given := {k: v for k, v in cells.items() if k and v}:
                    yield f"{table}:{number}", given
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table}: not a readable table: {first_line(error)}.") from None
