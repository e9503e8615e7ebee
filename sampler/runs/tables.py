"""Prompt files as streams of lines: txt, csv, tsv, jsonl, parquet, or standard input.

A line that is invalid by itself carries its error in place of its cells, so that
`--on-bad-row skip` can leave it out. What makes the rest of a file unreadable is raised.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sampler import registry
from sampler.config.formats import no_constant, unique
from sampler.core.errors import SamplerError, UsageError, first_line

MAX_LINE = 2**20  # bytes of a line, characters of a csv field
STDIN = "-"


class RawLine(NamedTuple):
    """One line of a prompt file, not checked yet.

    where: "file:line"; cells: by column, or the error of the line; text: all cells are text, to be
    read as numbers where a column is one; axes: values of a sweep that are already in the cells.
    """

    where: str
    cells: Mapping[str, Any] | SamplerError
    text: bool = False
    axes: Mapping[str, Any] = {}


def read_table(path: str | Path, kind: str | None = None) -> Iterator[RawLine]:
    """Yield the lines of a prompt file; `kind` ("csv", ...) overrides the name's suffix.

    Raises UsageError for a file that is missing, of another kind, or refused by its reader.
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


def _text_lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, str | SamplerError]]:
    """Yield ("file:line", text); a line that is not UTF-8 yields its error."""
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


def _txt(stream: BinaryIO, name: str) -> Iterator[RawLine]:
    for where, text in _text_lines(stream, name):
        if isinstance(text, SamplerError):
            yield RawLine(where, text)
        elif (prompt := text.strip(" \t\r\n")) and not prompt.startswith("#"):
            yield RawLine(where, {"prompt": prompt}, True)


def _jsonl(stream: BinaryIO, name: str) -> Iterator[RawLine]:
    for where, text in _text_lines(stream, name):
        if isinstance(text, SamplerError):
            yield RawLine(where, text)
        elif text.strip():
            yield RawLine(where, _json_object(text, where))


def _json_object(text: str, where: str) -> dict[str, Any] | SamplerError:
    try:
        found = json.loads(text, parse_constant=no_constant, object_pairs_hook=unique)
        if isinstance(found, dict):
            return found
        problem = "a line must be one object {...}"
    except RecursionError:
        return UsageError(f"{where}: nested too deeply.")
    except ValueError as error:
        problem = getattr(error, "msg", None) or str(error)
        if problem[1:3].islower():
            problem = problem[0].lower() + problem[1:]
    return UsageError(f"{where}: not a JSON line: {problem}.")


def _separated(delimiter: str) -> Callable[[BinaryIO, str], Iterator[RawLine]]:
    def read(stream: BinaryIO, name: str) -> Iterator[RawLine]:
        csv.field_size_limit(MAX_LINE)
        reader = csv.reader(_decoded(_text_lines(stream, name)), delimiter=delimiter, strict=True)
        first, header = 1, None
        try:
            for cells in reader:
                where, first = f"{name}:{first}", reader.line_num + 1
                if header is None:
                    header = _header(cells, name)
                elif not cells:
                    continue
                elif len(cells) != len(header):
                    problem = f"{len(cells)} cells, but the header has {len(header)}"
                    yield RawLine(where, UsageError(f"{where}: {problem}."))
                else:
                    yield RawLine(where, dict(zip(header, cells, strict=True)), True)
        except csv.Error as error:
            problem = "a quote is never closed" if "end of data" in str(error) else str(error)
            raise UsageError(f"{name}:{first}: {problem}.") from None
        if header is None:
            raise UsageError(f"{name}:1: the file is empty; it needs a header with 'prompt'.")

    return read


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[RawLine]]] = {
    "txt": _txt,
    "csv": _separated(","),
    "tsv": _separated("\t"),
    "jsonl": _jsonl,
}


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "prompt" not in header:
        shown = [repr(cell)[1:-1][:40] for cell in header[:20]]  # without line breaks
        hint = registry.suggestion("prompt", shown) if header else ""
        raise UsageError(f"{name}:1: the header needs a column 'prompt'{hint}.")
    if twice := [cell for cell in header if header.count(cell) > 1]:
        raise UsageError(f"{name}:1: the column {twice[0]!r:.60} is given twice.")
    return header


def _decoded(lines: Iterable[tuple[str, str | SamplerError]]) -> Iterator[str]:
    for _, text in lines:
        if isinstance(text, SamplerError):
            raise text
        yield text


def _parquet(path: Path, name: str) -> Iterator[RawLine]:
    """Yield row groups one after the other; rows are numbered from 1, nulls are left out."""
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
                for cells in table.to_pylist():
                    number += 1
                    given = {key: value for key, value in cells.items() if value is not None}
                    yield RawLine(f"{name}:{number}", given)
    except OSError as error:
        reason = (error.strerror or first_line(error)).lower()
        raise UsageError(f"{name}: {reason}.") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: not a readable parquet file: {first_line(error)}") from None
