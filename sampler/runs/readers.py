"""Readers of prompt files: text, jsonl and parquet to lines that are not checked yet.

Each reads the chunks of one file, as `readline` returns them, and yields `RawLine`. A line that is
invalid by itself carries its error in place of its cells, so that `--on-bad-row skip` can leave it
out. Errors that make the rest of a file unreadable are raised.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from sampler.config.formats import no_constant, unique
from sampler.core.errors import SamplerError, UsageError, first_line
from sampler.runs.option_lines import line_cells

MAX_LINE = 2**20  # bytes of a line, characters of a csv field
BETWEEN = "---"  # line between prompts of several lines


class RawLine(NamedTuple):
    """One line of a prompt file, not checked yet.

    where: "file:line"; cells: by column, or the error of the line; text: all cells are text, to be
    read as numbers where a column is one; axes: values of a sweep that are already in the cells;
    empty_prompt: an empty text cell is a prompt.
    """

    where: str
    cells: Mapping[str, Any] | SamplerError
    text: bool = False
    axes: Mapping[str, Any] = {}
    empty_prompt: bool = False


Reader = Callable[[Iterable[bytes], str], Iterator[RawLine]]


def text_lines(chunks: Iterable[bytes], name: str) -> Iterator[tuple[str, str | SamplerError]]:
    """Yield ("file:line", text); a line that is not UTF-8 yields its error."""
    for number, raw in enumerate(chunks, 1):
        if len(raw) > MAX_LINE:
            raise UsageError(f"{name}:{number}: the line is longer than 1 MiB.")
        try:
            yield f"{name}:{number}", raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            where = f"{name}:{number}"
            yield where, UsageError(f"{where}: not UTF-8 text.")


def prompt_lines(chunks: Iterable[bytes], name: str) -> Iterator[tuple[str, str | SamplerError]]:
    """Yield ("file:line", text) of lines with content that do not begin with #, or their error."""
    for where, text in text_lines(chunks, name):
        if isinstance(text, SamplerError):
            yield where, text
        elif (line := text.strip(" \t\r\n")) and not line.startswith("#"):
            yield where, line


def read_txt(chunks: Iterable[bytes], name: str) -> Iterator[RawLine]:
    """Yield one prompt per line, or of several lines if the first line is the separator `---`."""
    lines = prompt_lines(chunks, name)
    first = next(lines, None)
    if first is not None and first[1] == BETWEEN:
        lines = _blocks(lines)
    elif first is not None:
        lines = itertools.chain([first], lines)
    for where, text in lines:
        if text == BETWEEN:
            text = UsageError(f"{where}: --- is a separator only if the file begins with it.")
        yield _text_line(where, text)


def _text_line(where: str, text: str | SamplerError) -> RawLine:
    try:
        return RawLine(
            where, text if isinstance(text, SamplerError) else line_cells(text, where), True
        )
    except UsageError as error:
        return RawLine(where, error)


def _blocks(
    lines: Iterable[tuple[str, str | SamplerError]],
) -> Iterator[tuple[str, str | SamplerError]]:
    """Join the lines between separators; a block with an invalid line is that line's error."""
    block: list[str] = []
    start, error = "", None
    for where, text in itertools.chain(lines, [("", BETWEEN)]):
        if isinstance(text, SamplerError):
            error = error or text
        elif text != BETWEEN:
            block.append(text)
        start = start or where
        if text == BETWEEN:
            if block or error:
                yield start, error or "\n".join(block)
            block, start, error = [], "", None


def read_jsonl(chunks: Iterable[bytes], name: str) -> Iterator[RawLine]:
    """Yield one object per line; blank lines and objects of nulls alone are left out."""
    for where, text in text_lines(chunks, name):
        if isinstance(text, SamplerError):
            yield RawLine(where, text)
        elif text.strip():
            cells = _json_object(text, where)
            if isinstance(cells, SamplerError) or not _is_blank(cells):
                yield RawLine(where, cells)


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


def _is_blank(cells: Mapping[str, Any]) -> bool:
    """Check for a row of nulls, which is how pandas writes a blank row of a spreadsheet."""
    return bool(cells) and all(value is None for value in cells.values())


def read_parquet(stream: BinaryIO, name: str) -> Iterator[RawLine]:
    """Yield row groups one after the other; rows are numbered from 1.

    Nulls, and NaN, which some writers store in their place, are left out.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UsageError(
            f"{name}: parquet files need the extra 'data' (pip install 'diffusion-sampler[data]')."
        ) from None
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        for table in file.iter_batches(batch_size=1024):
            for cells in table.to_pylist():
                number += 1
                given = {key: value for key, value in cells.items() if not _is_null(value)}
                if given:
                    yield RawLine(f"{name}:{number}", given)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: not a readable parquet file: {first_line(error)}") from None


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
