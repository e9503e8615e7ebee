"""Prompt files as streams of lines: txt, csv, tsv, jsonl, parquet, or standard input.

The format goes by the name. Standard input and pipes (`<(...)`), which have none, are recognised by
their first line.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from sampler.core.errors import SamplerError, UsageError, first_line
from sampler.runs.csv_reader import read_separated
from sampler.runs.readers import (
    MAX_LINE,
    RawLine,
    prompt_lines,
    read_jsonl,
    read_parquet,
    read_txt,
)

STDIN = "-"
PARQUET, PARQUET_MAGIC = "parquet", b"PAR1"
_READERS = {
    "txt": read_txt,
    "csv": read_separated(","),
    "tsv": read_separated("\t"),
    "jsonl": read_jsonl,
}
FORMATS = (*_READERS, PARQUET)


def read_table(path: str | Path, kind: str | None = None) -> Iterator[RawLine]:
    """Yield the lines of a prompt file; `kind` ("csv", ...) overrides the name's suffix.

    Without a kind and a suffix, the first line decides. Raises UsageError for a file that is
    missing, of another kind, or refused by its reader.
    """
    is_stdin = str(path) == STDIN
    name = "standard input" if is_stdin else str(path)
    kind = kind or ("" if is_stdin else Path(path).suffix.lower().lstrip("."))
    if kind not in FORMATS and Path(path).is_dir():
        raise UsageError(f"{name}: is a directory; give a prompt file.")
    if kind and kind not in FORMATS:
        known = ", ".join(FORMATS)
        raise UsageError(
            f"{name}: prompt files are {known}; not {kind!r:.20} (--format names one)."
        )
    try:
        with sys.stdin.buffer if is_stdin else open(path, "rb") as stream:
            if kind == PARQUET and stream.seekable():
                yield from read_parquet(stream, name)
                return
            chunks = _chunks(stream)
            if not kind:
                kind, chunks = _recognised(chunks)
            if kind == PARQUET:
                yield from read_parquet(io.BytesIO(b"".join(chunks)), name)
            else:
                yield from _READERS[kind](chunks, name)
    except OSError as error:
        reason = (error.strerror or first_line(error)).lower()
        raise UsageError(f"{name}: {reason}.") from None


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file as they are, without blank ones and comments.

    Raises UsageError for a line that is too long or not UTF-8.
    """
    with open(path, "rb") as stream:
        for _, text in prompt_lines(_chunks(stream), str(path)):
            if isinstance(text, SamplerError):
                raise text
            yield text


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    return iter(partial(stream.readline, MAX_LINE + 1), b"")


def _recognised(chunks: Iterator[bytes]) -> tuple[str, Iterator[bytes]]:
    """Format of a file by its first line that is not blank, and all its lines.

    An object is jsonl, a list of columns with `prompt` is csv or tsv; anything else is text.
    """
    read: list[bytes] = []
    for chunk in chunks:
        read.append(chunk)
        if chunk.strip():
            break
    everything = itertools.chain(read, chunks)
    last = read[-1] if read else b""
    if last.startswith(PARQUET_MAGIC):
        return PARQUET, everything
    line = last.decode("utf-8-sig" if len(read) == 1 else "utf-8", "replace").strip()
    if line.startswith('{"') or _is_object(line):
        return "jsonl", everything
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        if "prompt" in (cell.strip(' "') for cell in line.split(delimiter)):
            return kind, everything
    return "txt", everything


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
