"""Scorers that ask a vision-language model about an image: `vqa`, and `dpg` with its tree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler.core.errors import SamplerError, UsageError
from sampler.evaluation.scorers import ImageScorer, digest_of
from sampler.objectives import score_questions
from sampler.runs.cells import scalar
from sampler.runs.tables import read_table

_COLUMNS = ("prompt", "q", "answer", "parents", "id", "category")


@dataclass(frozen=True)
class Question:
    """One question about the image of a prompt.

    answer: what counts as right, "yes" by default; parents: ids of the questions that have to be
    right as well; id: its number, by default its place among those of its prompt, from 1;
    category: such as "attribute", "" for none.
    """

    text: str
    answer: str
    parents: tuple[int, ...]
    id: int
    category: str = ""


def read_questions(source: str) -> dict[str, list[Question]]:
    """Return the questions of each prompt in a table with the columns prompt, q, answer, parents.

    parents: a list of numbers, or one, also as text ("1,2"); 0 is none. id and category are columns
    as well. Raises UsageError.
    """
    found: dict[str, list[Question]] = {}
    for cells, where in rows_of(source, ("prompt", "q")):
        if unknown := [key for key in cells if key not in _COLUMNS]:
            raise UsageError(
                f"{where}: {unknown[0]!r:.40}: a question has the columns {', '.join(_COLUMNS)}."
            )
        own = found.setdefault(text_of(cells, "prompt", where), [])
        above = cells.get("parents", [])
        if isinstance(above, str):
            above = scalar(above if above.startswith("[") else f"[{above}]")
        parents = [_whole(p) for p in (above if isinstance(above, list) else [above])]
        number = _whole(scalar(cells.get("id", len(own) + 1)))
        if min([number - 1, *parents]) < 0:
            raise UsageError(f"{where}: parents and id must be numbers of questions, from 1.")
        answer = cells.get("answer", True)
        if isinstance(answer, bool):
            answer = "yes" if answer else "no"
        question = text_of(cells, "q", where)
        category = str(cells.get("category", ""))
        own.append(
            Question(question, str(answer), tuple(p for p in parents if p), number, category)
        )
    for prompt, own in found.items():
        ids = {question.id for question in own}
        if len(ids) < len(own):
            raise UsageError(f"{source}: the prompt {prompt!r:.60} has two questions of one id.")
        try:
            score_questions([*ids], {q.id: q.parents for q in own}, [1] * len(ids))
        except ValueError as error:
            problem = str(error).removeprefix("score_questions: ")
            raise UsageError(f"{source}: the prompt {prompt!r:.60}: {problem}") from None
    return found


def _whole(value: Any) -> int:
    """A number of a question, also as 1.0; below 0 for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if is_number and float(value).is_integer() else -1


def text_of(cells: Mapping[str, Any], key: str, where: str) -> str:
    """Return a cell that is a text. Raises UsageError."""
    if not isinstance(cells[key], str):
        raise UsageError(f"{where}: {key} must be a text, not {cells[key]!r:.40}.")
    return cells[key]


def rows_of(source: str, needed: Sequence[str]) -> list[tuple[Mapping[str, Any], str]]:
    """Return the rows of a table without empty cells, and their places, with `needed` in each.

    Lists in tables of text are those of JSON.

    Raises UsageError for a missing file or cell, and for a table without rows.
    """
    if not Path(source).expanduser().is_file():
        raise UsageError(f"{source} does not exist; give a table with {', '.join(needed)}.")
    found: list[tuple[Mapping[str, Any], str]] = []
    for raw in read_table(source):
        if isinstance(raw.cells, SamplerError):
            raise raw.cells
        cells = {
            key: scalar(value) if raw.text and str(value).startswith("[") else value
            for key, value in raw.cells.items()
            if value not in (None, "")
        }
        if lacking := [key for key in needed if key not in cells]:
            raise UsageError(f"{raw.where}: {lacking[0]} is missing.")
        found.append((cells, raw.where))
    if not found:
        raise UsageError(f"{source} has no row.")
    return found


@dataclass
class QuestionScorer(ImageScorer):
    """Scores of answers to the questions of a prompt.

    vqa: the mean probability of the right answers. dpg: the share of right answers whose ancestors
    are all right, an answer being right where it is more probable than the other of yes and no (any
    other answer: where its probability is above one half); `released` looks at direct parents alone
    and in the file's order, as the published script does. Each category of the questions is a
    column of its own, the share of right answers to its questions whatever their parents' are, NaN
    for an image without one; its mean is the share of all its questions, so that a prompt counts as
    often as it has questions of the category. (The published script's table of categories is that
    of the last of four crops.)
    """

    name: str
    questions: str
    model: str
    released: bool = False

    reads_prompt = True

    def __post_init__(self) -> None:
        if not isinstance(self.released, bool):
            raise UsageError(f"{self.name}: released must be true or false, not {self.released!r}.")

    @property
    def label(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Name of the column, with the model; a protocol's own name needs its protocol."""
        model = Path(self.model).name + (", released" if self.released else "")
        return f"dpg-like({model})" if self.name == "dpg" else f"vqa({model})"

    @cached_property
    def _asked(self) -> dict[str, list[Question]]:
        return read_questions(self.questions)

    @cached_property
    def _network(self) -> Any:
        from sampler.evaluation.vlm import VisionLanguage

        return VisionLanguage(self.model)

    def check(self) -> None:
        _ = self._asked, self._network

    @cached_property
    def fingerprint(self) -> str:
        return digest_of(f"{self.label} {self._asked}", self._network)

    def columns(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows: list[dict[str, float]] = []
        for image, prompt in zip(images, prompts, strict=True):
            asked = asked_of(self._asked, prompt)
            rows.append(
                self._means(image, asked) if self.name == "vqa" else self._tree(image, asked)
            )
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    def _means(self, image: Tensor, asked: Sequence[Question]) -> dict[str, float]:
        found = [self._network.probabilities(image, q.text, [q.answer])[0] for q in asked]
        return {self.label: sum(found) / len(found)}

    def _tree(self, image: Tensor, asked: Sequence[Question]) -> dict[str, float]:
        """Return the score of an image, and the share of right answers of each category."""
        answers = [float(self._right(image, question)) for question in asked]
        parents = {question.id: question.parents for question in asked}
        order = [question.id for question in asked]
        found = {self.label: score_questions(order, parents, answers, released=self.released)}
        for name in self._categories:
            own = [a for a, q in zip(answers, asked, strict=True) if q.category == name]
            found[f"{self.label}.{name}"] = sum(own) / len(own) if own else math.nan
        return found

    def weights(self, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for name in self._categories if self.name == "dpg" else ():
            counts = {p: sum(q.category == name for q in asked_of(self._asked, p)) for p in prompts}
            found[f"{self.label}.{name}"] = {p: float(n) for p, n in counts.items() if n}
        return found

    @cached_property
    def _categories(self) -> list[str]:
        """Categories of all questions of the file, without "", in the order of their names."""
        return sorted({q.category for asked in self._asked.values() for q in asked} - {""})

    def _right(self, image: Tensor, question: Question) -> bool:
        other = {"yes": "no", "no": "yes"}.get(question.answer.strip().lower())
        asked = [question.answer] if other is None else [question.answer, other]
        p = self._network.probabilities(image, question.text, asked)
        return p[0] > (0.5 if other is None else p[1])


def asked_of(table: Mapping[str, Any], prompt: str) -> Any:
    """Return a prompt's entry of a table. Raises UsageError for a prompt without one."""
    if prompt not in table:
        raise UsageError(f"The prompt {prompt!r:.60} has no entry in the scorer's file.")
    return table[prompt]
