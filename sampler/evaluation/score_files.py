"""Cache of computed scores: `scores-NAME-FINGERPRINT.jsonl`, one line per image.

    {"v": 1, "image": "...", "scores": {"clip": 0.31}}

"image" is a hash of the file's content, the prompt and its metadata, so that a regenerated image is
scored again.
A scorer with other weights has another fingerprint, and a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sampler.runs import journal
from sampler.runs.jobs import canonical


class ScoreFile:
    """Known scores {image: {column: score}} of one scorer; folder None keeps them in memory."""

    def __init__(self, folder: Path | None, label: str, fingerprint: str) -> None:
        name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", label).strip("-")[:80]
        self._path = folder and folder / f"scores-{name}-{fingerprint[:8]}.jsonl"
        self.known: dict[str, dict[str, float]] = {}
        if self._path is None or not self._path.is_file():
            return
        for raw in self._path.read_bytes().split(b"\n"):
            try:
                line = json.loads(raw)
                scores = {str(k): float(v) for k, v in line["scores"].items()}
                self.known[str(line["image"])] = scores
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that a kill has cut short

    def add(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Append the scores of images that are not known yet. Raises StorageError."""
        new = {image: dict(found) for image, found in scores.items() if image not in self.known}
        self.known |= new
        if self._path is not None and new:
            lines = ({"image": image, "scores": found} for image, found in new.items())
            journal.append(self._path, lines, fsync=False)


def image_key(digest: str, prompt: str | None, meta: Mapping[str, Any]) -> str:
    """Hash of an image file, and the prompt and metadata that it is scored with."""
    text = f"{digest}\n{prompt or ''}" + (f"\n{canonical(meta)}" if meta else "")
    return hashlib.sha256(text.encode()).hexdigest()[:20]
