"""Scores of evaluations from detections and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")


def geneval_correct(
    boxes: Mapping[str, Sequence[Sequence[float]]],
    colours: Mapping[str, Sequence[str]],
    metadata: Mapping[str, Any],
) -> bool:
    """Correctness of an image by GenEval's rules.

    boxes: {class: [[x0, y0, x1, y1, score], ...]}, the surest first; colours: {class: a colour per
    box}; metadata: {"include": [{"class", "count", "color"?, "position"? [relation, index]}],
    "exclude": [{"class", "count"}]}. Of each included class the first `count` boxes are looked at:
    they have to exist, to have the colour, and to lie in the relation to the boxes of the included
    object `index`. An excluded class has fewer than `count` boxes. Raises ValueError for a position
    of another relation, and for one to an object that does not come before.

    Source: GenEval (Ghosh et al., 2023), arXiv:2310.11513.
    """
    correct = True
    matched: list[Sequence[Sequence[float]] | None] = []
    for wanted in metadata.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        found = list(boxes.get(name, ()))[:count]
        right = len(found) >= count
        if right and "color" in wanted:
            right = list(colours.get(name, ()))[:count].count(wanted["color"]) >= count
        if right and wanted.get("position"):
            relation, index = _position(wanted, len(matched))
            others = matched[index]
            right = others is not None and all(
                relation in _relations(a, b) for a in found for b in others
            )
        correct &= right
        matched.append(found if right else None)
    return correct and all(
        len(boxes.get(e["class"], ())) < e["count"] for e in metadata.get("exclude", ())
    )


def geneval_share(
    boxes: Mapping[str, Sequence[Sequence[float]]],
    colours: Mapping[str, Sequence[str]],
    metadata: Mapping[str, Any],
) -> float:
    """Share of what a GenEval prompt asks for that an image has, 0 to 1; 1 where it is correct.

    Arguments as in `geneval_correct`. The mean over the entries of "include" and "exclude": of an
    included class the mean of the found share of its count, min(found, count)/count, and of the
    share of the pairs that have the colour and the position, where these are asked for; of an
    excluded one 1 where there are fewer than `count`, else 0. Unlike the published reward, it has
    neither negative values nor credit for a wrong position.
    """
    shares: list[float] = []
    first: list[list[Sequence[float]]] = []
    for wanted in metadata.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        found = list(boxes.get(name, ()))[:count]
        parts = [len(found) / count]
        if "color" in wanted:
            right = list(colours.get(name, ()))[:count].count(wanted["color"])
            parts.append(right / count)
        if wanted.get("position"):
            relation, index = _position(wanted, len(first))
            pairs = [(a, b) for a in found for b in first[index]]
            holds = [relation in _relations(a, b) for a, b in pairs]
            parts.append(sum(holds) / len(pairs) if pairs else 0.0)
        shares.append(sum(parts) / len(parts))
        first.append(found)
    for entry in metadata.get("exclude", ()):
        shares.append(float(len(boxes.get(entry["class"], ())) < entry["count"]))
    return sum(shares) / len(shares) if shares else 1.0


def _position(wanted: Mapping[str, Any], before: int) -> tuple[str, int]:
    """Return relation and index of the position of an object with `before` ones before it."""
    relation, index = wanted["position"]
    if relation not in RELATIONS or not 0 <= index < before:
        raise ValueError(
            f"position = {wanted['position']!r:.60} of {wanted['class']!r:.40} must be a relation "
            f"({', '.join(RELATIONS)}) and the index of an earlier object."
        )
    return relation, index


def _relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Relations of box a to box b, of [x0, y0, x1, y1] each.

    The part of the offset of the centres that exceeds a tenth of the sum of the sizes, over the
    offset's length, has to be beyond 1/2.
    """
    first, second = np.asarray(a[:4]).reshape(2, 2), np.asarray(b[:4]).reshape(2, 2)
    offset = first.mean(0) - second.mean(0)
    size = np.abs(np.diff(first, axis=0))[0] + np.abs(np.diff(second, axis=0))[0]
    revised = np.maximum(np.abs(offset) - 0.1 * size, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):  # pixels
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    near = zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
    return {name for name, holds in near if holds}


def score_questions(
    order: Sequence[int],
    parents: Mapping[Any, Sequence[int]],
    answers: Sequence[Any],
    released: bool = False,
) -> float:
    """DPG-Bench score of one image: share of questions answered yes with all ancestors yes.

    order: question ids; parents: {id: [parent ids]}, 0 for none; answers: a number per question in
    that order, or several such lists (one per crop), whose scores are averaged. The result does not
    depend on the order: an answer counts 0 where any ancestor is no, at any depth. released: as the
    published script has it, an answer counts 0 where a direct parent counts 0 so far, in the given
    order, so that a child before its parent keeps its yes. Raises ValueError for a cycle, a parent
    without an answer, no question, two of one id, and answers of another number.

    Source: ELLA (Hu et al., 2024), arXiv:2403.05135, section 4.
    """
    if len(answers) and np.ndim(answers[0]):
        return sum(score_questions(order, parents, a, released) for a in answers) / len(answers)
    if not len(order) or not len(set(order)) == len(order) == len(answers):
        raise ValueError(
            f"score_questions needs different questions, at least one, with an answer each, not "
            f"{list(order)!r:.60} and {len(answers)} answers."
        )
    own = dict(zip(order, map(float, answers), strict=True))
    above = {int(k): [p for p in v if p] for k, v in parents.items()}
    if missing := {p for question in order for p in above.get(question, ())} - set(own):
        raise ValueError(f"score_questions: the parent {min(missing)} is not among the questions.")
    if released:
        for question in order:
            if any(own[parent] == 0 for parent in above.get(question, ())):
                own[question] = 0.0
        return sum(own.values()) / len(order)
    known: dict[int, float] = {}

    def value(question: int, path: tuple[int, ...]) -> float:
        if question in path:
            raise ValueError(f"score_questions: question {question} depends on itself.")
        if question not in known:
            path = (*path, question)
            yes = all(value(parent, path) for parent in above.get(question, ()))
            known[question] = own[question] if yes else 0.0
        return known[question]

    return sum(value(question, ()) for question in order) / len(order)
