"""Reader of csv and tsv files, also of those that `sampler export` has written."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator

from sampler import registry
from sampler.core.errors import SamplerError, UsageError
from sampler.runs.exported import RESULTS_NOTE, is_exported, settings_of_row
from sampler.runs.readers import MAX_LINE, RawLine, Reader, text_lines


def read_separated(delimiter: str) -> Reader:
    """Reader of csv or tsv; rows of empty cells, as spreadsheets write them, are left out."""

    def read(chunks: Iterable[bytes], name: str) -> Iterator[RawLine]:
        csv.field_size_limit(MAX_LINE)
        reader = csv.reader(_decoded(text_lines(chunks, name)), delimiter=delimiter, strict=True)
        first, header, exported = 1, None, False
        try:
            for cells in reader:
                where, first = f"{name}:{first}", reader.line_num + 1
                if header is None:
                    header = _header(cells, name)
                    if exported := is_exported(header):
                        warnings.warn(f"{name}: {RESULTS_NOTE}", stacklevel=2)
                elif any(cell.strip() for cell in cells):
                    row = _row(header, cells, where)
                    if exported and isinstance(row, dict):
                        row = settings_of_row(row)
                    yield RawLine(where, row, True, empty_prompt=exported)
        except csv.Error as error:
            problem = "a quote is never closed" if "end of data" in str(error) else str(error)
            raise UsageError(f"{name}:{first}: {problem}.") from None
        if header is None:
            raise UsageError(f"{name}:1: the file is empty; it needs a header with 'prompt'.")

    return read


def _header(cells: list[str], name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if "prompt" not in header:
        shown = [repr(cell)[1:-1][:40] for cell in header[:20]]  # without line breaks
        hint = registry.suggestion("prompt", shown) if header else ""
        raise UsageError(f"{name}:1: the header needs a column 'prompt'{hint}.")
    if twice := [cell for cell in header if cell and header.count(cell) > 1]:
        raise UsageError(f"{name}:1: the column {twice[0]!r:.60} is given twice.")
    return header


def _row(header: list[str], cells: list[str], where: str) -> dict[str, str] | SamplerError:
    """Cells by column; columns without a name, as spreadsheets leave them, must be empty."""
    if len(cells) != len(header):
        return UsageError(f"{where}: {len(cells)} cells, but the header has {len(header)}.")
    for number, (column, cell) in enumerate(zip(header, cells, strict=True), 1):
        if not column and cell.strip():
            return UsageError(
                f"{where}: cell {number} is {cell!r:.40}, but its column has no name."
            )
    return {column: cell for column, cell in zip(header, cells, strict=True) if column}


def _decoded(lines: Iterable[tuple[str, str | SamplerError]]) -> Iterator[str]:
    for _, text in lines:
        if isinstance(text, SamplerError):
            raise text
        yield text
