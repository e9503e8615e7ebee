"""The log of a run: JSON Lines, one line per update and per evaluation; truncated on resume.

    {"kind": "update", "update": 3, "loss": ..., "reward": ..., "grad_norm": ..., ...}
    {"kind": "eval", "update": 10, "reward": ..., "reward_std": ..., "drift": ...}

`update` counts the updates done. Every field but "seconds" and "cpu_seconds" is identical when a
killed run is resumed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from sampler.core.durable import write_file

FILE = "log.jsonl"


class Journal:
    """Append records to `folder`/log.jsonl; `records` holds those written so far."""

    def __init__(self, folder: Path, done: int, active: bool = True) -> None:
        """Drop records after `done` updates, which are repeated; write only where `active`."""
        self._path = folder / FILE
        self._active = active
        self.records = [r for r in _read(self._path) if r.get("update", math.inf) <= done]
        if active:
            text = "".join(_line(record) for record in self.records)
            write_file(self._path, text.encode())

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Append one record and return it; a kill leaves it complete, partial or absent.

        JSON has no NaN: a value that is not finite becomes None.
        """
        record = {key: _finite(value) for key, value in record.items()}
        self.records.append(record)
        if self._active:
            with self._path.open("ab") as file:
                file.write(_line(record).encode())
        return record

    def sync(self) -> None:
        """Flush the records to disk, before a checkpoint relies on them."""
        if self._active:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the records of evaluations, in order."""
        return [r for r in self.records if r.get("kind") == "eval"]


def _finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
