"""Journal of a run: one JSON line per result, appended; the last line of a key wins.

    {"v":1,"key","index","status":"ok|error|skipped","file","sha256","bytes","seed","nfe","ms",
     "batch","micro","w","h","warnings":[...],"error":{"code","where","message"}}
    {"v":1,"event":"micro","group","size"}      a batch size that fits the memory

Lines that a crash has cut short, and any others that are not such objects, are ignored and counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sampler.core.durable import attempt, write_all

FORMAT = 1
PREFIX = "journal"

Entry = dict[str, Any]


def journal_name(worker: int) -> str:
    """File name of a worker's journal."""
    return f"{PREFIX}.jsonl" if worker == 0 else f"{PREFIX}-{worker}.jsonl"


def encode(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """Encode lines for appending."""
    parts = [json.dumps({"v": FORMAT, **line}, ensure_ascii=False, allow_nan=False) + "\n"
             for line in lines]  # fmt: skip
    return "".join(parts).encode()


def append(path: Path, lines: Iterable[Mapping[str, Any]], fsync: bool = True) -> None:
    """Append durably; an incomplete last line is terminated first. Raises StorageError."""
    data = encode(lines)

    def write() -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            write_all(handle, (b"\n" if torn else b"") + data)
            if fsync:
                os.fsync(handle)
        finally:
            os.close(handle)

    attempt(write, path)


@dataclass
class JournalResults:
    """Content of journals. entries: by key; micro: batch size by group; bad: unreadable lines."""

    entries: dict[str, Entry] = field(default_factory=dict)
    micro: dict[int, int] = field(default_factory=dict)
    bad: int = 0


def read(journals: Iterable[bytes]) -> JournalResults:
    """Merge journals. Across journals "ok" wins: another worker generated the image."""
    merged = JournalResults()
    for data in journals:
        own = _read(data)
        for key, entry in own.entries.items():
            known = merged.entries.get(key)
            if known is None or known["status"] != "ok" or entry["status"] == "ok":
                merged.entries[key] = entry
        for group, size in own.micro.items():
            merged.micro[group] = min(size, merged.micro.get(group, size))
        merged.bad += own.bad
    return merged


def _read(data: bytes) -> JournalResults:
    results = JournalResults()
    for raw in data.split(b"\n"):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
            if line.get("event") == "micro":
                results.micro[int(line["group"])] = max(1, int(line["size"]))
            elif _is_entry(line):
                results.entries[line["key"]] = line
            else:
                results.bad += 1
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            results.bad += 1
    return results


def _is_entry(line: Mapping[str, Any]) -> bool:
    """Check the fields that readers rely on."""
    if not isinstance(line.get("key"), str) or not isinstance(line.get("index"), int):
        return False
    if line.get("status") == "ok":
        return (
            isinstance(line.get("file"), str)
            and isinstance(line.get("bytes"), int)
            and isinstance(line.get("sha256"), str)
        )
    return line.get("status") in ("error", "skipped")
