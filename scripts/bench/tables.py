"""CSV files of benchmarks, written row by row, so that a run that is cut keeps what it has."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class Table:
    """A CSV file whose first line says what made it; a row is on disk as soon as it is measured.

    key: the columns that identify a row. Rows of an earlier call stay, and are not measured again.
    Raises SystemExit for a file that was made elsewhere or in another way.
    """

    def __init__(self, path: Path, note: str, key: Sequence[str]) -> None:
        self.path, self.note, self.key = path, note, tuple(key)
        self.rows: list[dict[str, str]] = []
        if path.exists():
            first, *lines = path.read_text(encoding="utf-8").splitlines()
            if first != f"# {note}":
                raise SystemExit(
                    f"{path} was made by {first[2:]!r}, not by {note!r}: move it away, or give "
                    "another folder with --out."
                )
            self.rows = list(csv.DictReader(lines))

    def __contains__(self, key: Sequence[str]) -> bool:
        return any(tuple(row[column] for column in self.key) == tuple(key) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write it out at once."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            if new:
                file.write(f"# {self.note}\n")
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({name: str(value) for name, value in row.items()})


Task = tuple[tuple[str, ...], Callable[[], dict[str, Any]]]  # a row's key, and what measures it


def fill(table: Table, tasks: Iterable[Task], seconds: float) -> Iterator[dict[str, Any]]:
    """Measure the rows that a table lacks, until the time is up; yield each when it is written.

    The longest row so far has to fit into what is left. Prints how many rows are left.
    """
    left = [(key, measure) for key, measure in tasks if key not in table]
    begin, longest = time.monotonic(), 0.0
    for place, (_, measure) in enumerate(left):
        started = time.monotonic()
        if started - begin + longest > seconds:
            print(f"{table.path.name}: {len(left) - place} rows are left; call again to go on.")
            return
        row = measure()
        table.add(row)
        longest = max(longest, time.monotonic() - started)
        yield row
