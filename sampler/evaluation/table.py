"""An evaluation as a table: Markdown, JSON, and CSV with one line per image."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sampler.core.durable import write_file
from sampler.evaluation.compare import Row
from sampler.evaluation.features import finite
from sampler.evaluation.scoring import Scored
from sampler.runs.exported import protected

NAME = "eval"  # of the files


@dataclass(frozen=True)
class Evaluation:
    """Result of `sampler.evaluate`.

    facts: of the images, model and scorers, and of the run that they are compared with; rows: one
    per score; notes: remarks for the reader; scored: all scores of single images.
    """

    facts: dict[str, Any]
    rows: list[Row]
    notes: list[str]
    scored: Scored

    def __getitem__(self, scorer: str) -> Row:
        """Return the row of a scorer. Raises KeyError with the names that there are."""
        for row in self.rows:
            if row.scorer == scorer:
                return row
        raise KeyError(f"{scorer!r} is not one of {', '.join(row.scorer for row in self.rows)}")

    def plain(self) -> dict[str, Any]:
        """Return plain data: facts, rows and notes."""
        return {**self.facts, "notes": self.notes, "rows": [row.plain() for row in self.rows]}

    def markdown(self) -> str:
        """Return the rows as a Markdown table, with the notes below."""
        against = any(row.other is not None for row in self.rows)
        head = ["scorer", "mean", "95 % interval", "prompts", "images"]
        if against:
            head += ["other", "difference", "95 % interval", "wins / ties / losses", "shown"]
        lines = [_line(head), _line(["---"] * len(head))]
        lines += [_line(_cells(row, against)) for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}." for note in self.notes)]) + "\n"

    def heading(self) -> str:
        """Return the settings behind the images, and the scorers' fingerprints, as a table."""
        other = self.facts.get("against")
        lines = [_line(["setting", "value", *([] if other is None else ["compared with"])])]
        lines.append(_line(["---"] * (2 if other is None else 3)))
        for key in dict.fromkeys([*self.facts, *(other or ())]):
            if key not in ("scorers", "against"):
                sides = [facts.get(key, "") for facts in (self.facts, other) if facts is not None]
                lines.append(_line([key.replace("_", " "), *map(_text, sides)]))
        for label, fingerprint in self.facts.get("scorers", {}).items():
            lines.append(_line([f"scorer {label}", *[fingerprint] * (1 if other is None else 2)]))
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return one line per image: file, prompt, seed, and its scores."""
        buffer = io.StringIO(newline="")
        columns = ["file", "prompt", "seed", "nfe", *self.scored.images]
        writer = csv.writer(buffer)
        writer.writerow(columns)
        for i, picture in enumerate(self.scored.source.pictures):
            scores = [finite(values[i]) for values in self.scored.images.values()]
            own = [picture.name, picture.prompt, picture.seed, picture.nfe]
            writer.writerow([protected(cell) for cell in own] + scores)
        return buffer.getvalue()

    def write(self, folder: Path) -> None:
        """Write eval.md, eval.json and eval.csv to a folder that exists. Raises StorageError."""
        text = json.dumps(self.plain(), indent=1, sort_keys=True, ensure_ascii=False)
        write_file(folder / f"{NAME}.json", f"{text}\n".encode())
        write_file(folder / f"{NAME}.md", f"{self.markdown()}\n{self.heading()}".encode())
        write_file(folder / f"{NAME}.csv", self.csv().encode())


def _cells(row: Row, against: bool) -> list[str]:
    cells = [row.scorer, _number(row.mean), _range(row.interval), str(row.prompts), str(row.images)]
    if not against:
        return cells
    gap = row.difference
    if gap is None:
        return [*cells, _number(row.other), "", "", "", ""]
    counts = f"{gap.wins} / {gap.ties} / {gap.losses}"
    shown = [_number(gap.mean, "+"), _range(gap.interval, "+"), counts, gap.verdict]
    return [*cells, _number(row.other), *shown]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4g}"


def _range(found: tuple[float, float] | None, sign: str = "") -> str:
    return "" if found is None else f"{found[0]:{sign}.4g} to {found[1]:{sign}.4g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
