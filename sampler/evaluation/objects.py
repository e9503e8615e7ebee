"""The scorer `geneval`: objects, counts, colours and positions in a prompt, by a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler.core.errors import UsageError
from sampler.evaluation.questions import asked_of, rows_of, text_of
from sampler.evaluation.scorers import ImageScorer, digest_of
from sampler.objectives import geneval_correct, geneval_share
from sampler.objectives.scoring import RELATIONS

# Of the published evaluation (Ghosh et al., 2023, arXiv:2310.11513, and its code): the threshold of
# detections, that of prompts whose tag is "counting", and the largest number of boxes of a class.
THRESHOLD, COUNTING, MOST = 0.3, 0.9, 16
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
_WORDS = ("a photo of a {0} {1}", "a photo of a {0}-colored {1}", "a photo of a {0} object")
_SMALLEST = 16  # pixels of a crop, along each side
_COLUMNS = ("prompt", "include", "exclude", "tag")
_ENTRY = ("class", "count")
_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def read_objects(source: str) -> dict[str, Mapping[str, Any]]:
    """Return what each prompt asks for, as `geneval_correct` takes it, from a table.

    Columns: prompt; include, a list of {"class", "count", "color"?, "position"?}; exclude and tag,
    which may be left out. Raises UsageError.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for cells, where in rows_of(source, ("prompt", "include")):
        _check_keys(cells, _COLUMNS, "a row", where)
        if cells.get("tag", _TAGS[0]) not in _TAGS:
            raise UsageError(f"{where}: tag must be one of {', '.join(_TAGS)}.")
        included = _entries(cells, "include", where)
        for number, entry in enumerate(included):
            _check_entry(entry, (*_ENTRY, "color", "position"), where)
            if entry.get("color", COLOURS[0]) not in COLOURS:
                raise UsageError(f"{where}: color must be one of {', '.join(COLOURS)}.")
            _check_position(entry.get("position"), number, where)
        excluded = _entries(cells, "exclude", where)
        for entry in excluded:
            _check_entry(entry, _ENTRY, where)
        if not included and not excluded:
            raise UsageError(f"{where}: include must name an object.")
        prompt = text_of(cells, "prompt", where)
        if found.get(prompt, cells) != cells:
            raise UsageError(f"{where}: the prompt {prompt!r:.60} has another row already.")
        found[prompt] = cells
    return found


def _check_keys(given: Mapping[str, Any], known: Sequence[str], what: str, where: str) -> None:
    if unknown := [key for key in given if key not in known]:
        raise UsageError(f"{where}: {unknown[0]!r:.40}: {what} has {', '.join(known)}.")


def _check_entry(entry: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Raise UsageError for unknown keys and a count that does not fit; a count is 1 by default."""
    _check_keys(entry, known, f"the object {entry['class']!r:.40}", where)
    count = entry.setdefault("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise UsageError(f"{where}: count must be an integer from 1 to {MOST}, not {count!r:.40}.")


def _check_position(position: Any, number: int, where: str) -> None:
    """Raise UsageError for anything but [RELATION, INDEX of an object before the number-th]."""
    if position is None or position == []:
        return
    relation, index = position if isinstance(position, list) and len(position) == 2 else ("", "")
    if relation not in RELATIONS or type(index) is not int or not 0 <= index < number:
        raise UsageError(
            f"{where}: position must be [RELATION, INDEX] of an earlier object, with one of "
            f"{', '.join(RELATIONS)}, not {position!r:.60}."
        )


def _entries(cells: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    entries = cells.get(key) or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("class"), str) for entry in entries
    ):
        raise UsageError(f'{where}: {key} must be a list of {{"class": ..., "count": ...}}.')
    return entries


@dataclass
class ObjectScorer(ImageScorer):
    """Correctness of what an image shows, by GenEval's rules, and the share that is correct.

    Boxes are those of `detector` above the threshold, the surest first; the colour of a box is the
    nearest of ten by `clip`, on the box cut out of the image.

    objects: table of what each prompt asks for. detector: folder of a detector in the transformers
    layout, of fixed classes (DETR, YOLOS, RT-DETR) or of an open vocabulary (OWLv2, Grounding
    DINO). clip: folder of a CLIP model, needed where a prompt names a colour. threshold: of
    detections.
    """

    objects: str
    detector: str
    clip: str | None = None
    threshold: float = THRESHOLD

    reads_prompt = True

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float))
        if not number or not 0 < self.threshold < 1:
            raise UsageError(f"geneval: threshold = {self.threshold} must be above 0 and below 1.")

    @property
    def label(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Name of the column, with the detector; the protocol's own name needs the protocol."""
        return f"geneval-like({Path(self.detector).name})"

    @cached_property
    def _asked(self) -> dict[str, Mapping[str, Any]]:
        return read_objects(self.objects)

    @cached_property
    def _detector(self) -> Any:
        from sampler.rewards.encoders import Vision, is_open

        kind = "ZeroShotObjectDetection" if is_open(self.detector) else "ObjectDetection"
        return Vision(f"AutoModelFor{kind}", self.detector, "float32", False)

    @cached_property
    def _clip(self) -> Any:
        from sampler.rewards.encoders import Clip

        if self.clip is None:
            raise UsageError(
                "geneval: a prompt names a colour; give clip=FOLDER of a CLIP model as well."
            )
        return Clip(self.clip, "float32", False)

    def check(self) -> None:
        detector, wanted = self._detector, [_asked(entry) for entry in self._asked.values()]
        names = {entry["class"] for entries in wanted for entry in entries}
        if detector.tokenizer is None and (unknown := sorted(names - set(detector.labels))):
            raise UsageError(
                f"The detector {self.detector} has no class {unknown[0]!r:.40}; use one that has, "
                "or one of an open vocabulary."
            )
        if any("color" in entry for entries in wanted for entry in entries):
            _ = self._clip

    @cached_property
    def fingerprint(self) -> str:
        self.check()
        networks = [self._detector, *([self._clip] if "_clip" in vars(self) else [])]
        return digest_of(f"{self.label} {self.threshold} {self._asked}", *networks)

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        correct: list[float] = []
        shares: list[float] = []
        for image, prompt in zip(images, prompts, strict=True):
            asked = asked_of(self._asked, prompt)
            boxes = self.boxes(image, asked)
            coloured = {e["class"] for e in asked.get("include", ()) if "color" in e}
            colours = {n: [self.colour(image, n, box) for box in boxes[n]] for n in coloured}
            correct.append(float(geneval_correct(boxes, colours, asked)))
            shares.append(geneval_share(boxes, colours, asked))
        return {self.label: torch.tensor(correct), f"{self.label}.share": torch.tensor(shares)}

    def boxes(self, image: Tensor, asked: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        """Return the boxes of each class that a prompt names, in pixels with their probability."""
        names = sorted({entry["class"] for entry in _asked(asked)})
        limit = max(self.threshold, COUNTING) if asked.get("tag") == "counting" else self.threshold
        size = torch.tensor([image.shape[2], image.shape[1]] * 2, dtype=torch.float32)
        found: dict[str, list[list[float]]] = {}
        with torch.no_grad():
            answers = self._detector.detections(image[None], names)
        for name, (p, boxes) in zip(names, answers, strict=True):
            surest = p[0].argsort(descending=True, stable=True)[:MOST].tolist()
            rows = [row for row in surest if float(p[0, row]) > limit]
            found[name] = [[*(boxes[0, row] * size).tolist(), float(p[0, row])] for row in rows]
        return found

    def colour(self, image: Tensor, name: str, box: Sequence[float]) -> str:
        """Return the colour of ten that CLIP finds nearest to a box of an image [3, H, W]."""
        crop = image[None, :, slice(*_side(box[1], box[3], image.shape[1]))]
        crop = crop[..., slice(*_side(box[0], box[2], image.shape[2]))]
        with torch.no_grad():
            texts = [words.format(colour, name) for colour in COLOURS for words in _WORDS]
            known = self._clip.text(texts).view(len(COLOURS), len(_WORDS), -1).mean(1)
            nearest = (known / known.norm(dim=1, keepdim=True)) @ self._clip.image(crop)[0]
        return COLOURS[int(nearest.argmax())]


def _asked(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*metadata.get("include", ()), *metadata.get("exclude", ())]


def _side(low: float, high: float, size: int) -> tuple[int, int]:
    """Pixels of a side of a box inside the image, at least 16 where the image has them."""
    first, last = max(0, int(low)), min(size, int(high) + 1)
    grown = max(0, min(_SMALLEST, size) - (last - first))
    first = max(0, min(first - grown // 2, size - min(_SMALLEST, size)))
    return first, max(last, min(size, first + _SMALLEST))
