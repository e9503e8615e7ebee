"""Prompt files as rows: txt, csv, tsv, jsonl, parquet, or standard input; read as streams.

Every reader yields ("file:line", mapping of columns), or ("file:line", SamplerError) for a row that
is wrong by itself, which `--on-bad-row skip` may pass over. What makes the rest unreadable is
raised.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sampler import registry
from sampler.config.formats import no_constant, unique
from sampler.errors import SamplerError, UsageError, first_line

MAX_LINE = 2**20  # bytes of a line, characters of a csv field
STDIN = "-"

Line = tuple[str, "Mapping[str, Any] | SamplerError"]


def read_table(path: str | Path, kind: str | None = None) -> Iterator[Line]:
    """The rows of a prompt file; `kind` ("csv", ...) where the name does not tell.

    Raises SamplerError (2): a file that is missing or of another kind, and what its reader refuses.
    """
    name = "standard input" if str(path) == STDIN else str(path)
    kind = kind or ("txt" if str(path) == STDIN else Path(path).suffix.lower().lstrip("."))
    if kind == "parquet":
        yield from _parquet(Path(path), name)
        return
    if kind not in _READERS and Path(path).is_dir():
        raise UsageError(f"{name}: is a directory; give a prompt file.")
    if kind not in _READERS:
        known = ", ".join([*_READERS, "parquet"])
        raise UsageError(f"{name}: prompt files are {known}; not {kind or 'this'!r:.20}.")
    try:
        with sys.stdin.buffer if str(path) == STDIN else open(path, "rb") as stream:
            yield from _READERS[kind](stream, name)
    except OSError as error:
        reason = (error.strerror or "it cannot be read").lower()
        raise UsageError(f"{name}: {reason}.") from None


def is_text(kind: str) -> bool:
    """Whether the cells of this kind of file are all text, to be read as numbers where due."""
    return kind in ("txt", "csv", "tsv")


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, str | SamplerError]]:
    """Numbered lines as text; a line that is not UTF-8 is an error in its place."""
    number = 0
    while raw := stream.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE:
            raise UsageError(f"{name}:{number}: the line is longer than 1 MiB.")
        try:
            yield f"{name}:{number}", raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            where = f"{name}:{number}"
            yield where, UsageError(f"{where}: this is not UTF-8 text.")


def _txt(stream: BinaryIO, name: str) -> Iterator[Line]:
    for where, text in _lines(stream, name):
        if isinstance(text, SamplerError):
            yield where, text
        elif (prompt := text.strip(" \t\r\n")) and not prompt.startswith("#"):
            yield where, {"prompt": prompt}


def _jsonl(stream: BinaryIO, name: str) -> Iterator[Line]:
    for where, text in _lines(stream, name):
        if isinstance(text, SamplerError):
            yield where, text
        elif text.strip():
            try:
                row = json.loads(text, parse_constant=no_constant, object_pairs_hook=unique)
                if not isinstance(row, dict):
                    raise ValueError("a line must be one object {...}")
                yield where, row
            except RecursionError:
                yield where, UsageError(f"{where}: nested too deeply.")
            except ValueError as error:
                text = getattr(error, "msg", None) or str(error)
                if text[1:3].islower():
                    text = text[0].lower() + text[1:]
                yield where, UsageError(f"{where}: this is no JSON line: {text}.")


def _separated(delimiter: str) -> Callable[[BinaryIO, str], Iterator[Line]]:
    def read(stream: BinaryIO, name: str) -> Iterator[Line]:
        csv.field_size_limit(MAX_LINE)
        reader = csv.reader(_or_raise(_lines(stream, name)), delimiter=delimiter, strict=True)
        begun, header = 1, None
        try:
            for cells in reader:
                where, begun = f"{name}:{begun}", reader.line_num + 1
                if header is None:
                    header = _header(cells, name)
                elif not cells:
                    continue
                elif len(cells) != len(header):
                    problem = f"{len(cells)} cells, but the header has {len(header)}"
                    yield where, UsageError(f"{where}: {problem}.")
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            problem = "a quote is never closed" if "end of data" in str(error) else str(error)
            raise UsageError(f"{name}:{begun}: {problem}.") from None
        if header is None:
            raise UsageError(f"{name}:1: the file is empty; it needs a header with 'prompt'.")

    return read


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Line]]] = {
    "txt": _txt,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "jsonl": _jsonl,
}


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "prompt" not in header:
        shown = [repr(cell)[1:-1][:40] for cell in header[:20]]  # no line breaks of strangers
        hint = registry.suggestion("prompt", shown) if header else ""
        raise UsageError(f"{name}:1: the header needs a column 'prompt'{hint}.")
    if twice := [cell for cell in header if header.count(cell) > 1]:
        raise UsageError(f"{name}:1: the column {twice[0]!r:.60} is given twice.")
    return header


def _or_raise(lines: Iterable[tuple[str, str | SamplerError]]) -> Iterator[str]:
    for _, text in lines:
        if isinstance(text, SamplerError):
            raise text
        yield text


def _parquet(path: Path, name: str) -> Iterator[Line]:
    """Row groups one after the other; the line is the number of the row, from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UsageError(
            f"{name}: parquet files need the extra 'data' (pip install diffusion-sampler[data])."
        ) from None
    try:
        with open(path, "rb") as stream:
            file = pyarrow.parquet.ParquetFile(io.BufferedReader(stream))
            number = 0
            for table in file.iter_batches(batch_size=1024):
                for row in table.to_pylist():
                    number += 1
                    yield (
                        f"{name}:{number}",
                        {key: value for key, value in row.items() if value is not None},
                    )
    except OSError as error:
        reason = (error.strerror or first_line(error)).lower()
        raise UsageError(f"{name}: {reason}.") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(
            f"{name}: this is no parquet file that can be read: {first_line(error)}"
        ) from None
