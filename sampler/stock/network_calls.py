"""Network calls of a stock pipeline's step, and the rows of them that a rule asks for.

In the first step of a run every call is evaluated in full; in later ones the rule's plan says which
rows are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sampler_kernels import leaves
from torch import Tensor

from sampler.stock.answers import Answer, scattered, whole
from sampler.stock.forms import Form
from sampler.stock.interception import Call
from sampler.stock.negative_calls import NegativeCalls
from sampler.stock.readings import is_single
from sampler.stock.rule_steps import RuleSteps, mask
from sampler.stock.run_formula import RunFormula
from sampler.stock.stock_calls import call_on_rows, couples_rows, has_state

log = logging.getLogger("sampler")


class NetworkCalls:
    """Calls of the networks since the last scheduler step.

    answers: of this step, in call order. expected: those of the last one, none before the first.
    """

    def __init__(
        self,
        networks: Sequence[Any],
        steps: RuleSteps,
        formula: RunFormula,
        negative: NegativeCalls | None,
    ) -> None:
        self.networks, self.steps, self.formula = list(networks), steps, formula
        self.negative = negative
        self.begin()

    def begin(self) -> None:
        """Begin a run."""
        self.expected: list[Answer] = []
        self._next: Tensor | None = None
        self._coupled: dict[int, bool] = {}  # by number of a network, where a call asked
        self.forget()

    def forget(self) -> None:
        """Forget the calls of an unfinished step."""
        self.answers: list[Answer] = []

    def end_step(self, after: Tensor | None) -> None:
        """End a step; after: the sample of the next one, None where it has another shape."""
        self._next, self.expected = after, self.answers
        self.forget()

    @property
    def as_before(self) -> bool:
        """Return whether the calls of this step are those of the last one."""
        return [a.key for a in self.answers] == [a.key for a in self.expected]

    def are(self, output: Tensor) -> bool:
        """Return True if a model_output is the answers of several calls, one below the other."""
        values = [answer.value for answer in self.answers if answer.value.numel()]
        if len(values) < 2 or sum(map(len, values)) != len(output):
            return False
        blocks = output.split(len(values[0]))
        return all(any(torch.equal(v, block) for block in blocks) for v in values)

    def beside(self, output: Tensor) -> bool:
        """Return True if a model_output belongs to another value of the last step's answers, such
        as the sound of a video, whose steps follow those of the first.
        """
        for answer in self.expected:
            values = leaves(
                [*answer.raw.values()] if isinstance(answer.raw, Mapping) else answer.raw
            )
            shapes = [value.shape[1:] for value in values if isinstance(value, Tensor)]
            if output.shape[1:] in shapes[1:] and output.shape[1:] != shapes[0]:
                return True
        return False

    def counted(self, form: Form, nfe: Sequence[int]) -> list[int]:
        """`nfe` of each sample with the evaluated rows of this step."""
        used = {a.network for a, count in zip(self.answers, form.used, strict=True) if count}
        found = list(nfe)
        for answer, count in zip(self.answers, form.used, strict=True):
            if not count and answer.network in used:  # for another end, such as attention maps
                count = answer.count // len(found)
            rows = answer.evaluated
            per_row = [count] * len(found)
            if rows is not None and count:
                per_row = rows.view(count, -1).sum(0).tolist()
            found = [n + k * answer.cost for n, k in zip(found, per_row, strict=True)]
        return found

    def evaluate(self, number: int, call: Call, args: Any, kwargs: Any, given: Any) -> Any:
        """The answer of network `number`, called on the sample `given`."""
        count = len(given) if isinstance(given, (Tensor, list, tuple)) else 0
        for answer in self.answers:
            if answer.is_handed_to(args, kwargs, count):
                answer.readers.append(len(self.answers))
        call, cost = self._against(number, call, given)
        due, last = self._due(number, count)
        if due is None or last is None:
            due, (raw, value) = None, whole(call, args, kwargs, count)
        elif due.any() and has_state(args, kwargs):
            due, (raw, value) = None, whole(call, args, kwargs, count)
        elif due.any():
            read_only = not last.value.numel()
            raw, value, due = self._partial(number, call, args, kwargs, due, read_only)
        else:
            raw, value = last.raw, last.value
        self.answers.append(Answer(number, count, raw, value, due, cost))
        return raw

    def _due(self, number: int, count: int) -> tuple[Tensor | None, Answer | None]:
        """Rows [count] that this call has to evaluate, None for all, and the last such answer.

        A call whose answer only goes into other calls of the step, as that of a ControlNet does, is
        due in the rows in which those are.
        """
        form, position = self.formula.form, len(self.answers)
        if form is None or not form.settled or position >= len(self.expected):
            return None, None
        last = self.expected[position]
        known = all(a.key == e.key for a, e in zip(self.answers, self.expected, strict=False))
        if last.key != (number, count) or not known or self._next is None:
            return None, None
        if not {"extra", "idle"}.isdisjoint(form.roles):
            return None, None
        readers = [position] if form.used[position] else last.readers
        networks = [number, *(self.expected[at].network for at in readers)]
        single = all(is_single(self.expected[at].raw) and form.used[at] for at in readers)
        if not readers or not single or any(map(self._couples_rows, networks)):
            return None, None
        planned = [self._planned_rows(form, at, self._next) for at in readers]
        if any(rows is None for rows in planned):
            return None, last
        found = torch.stack([rows for rows in planned if rows is not None]).any(0)
        return (None if found.all() else found), last

    def _couples_rows(self, number: int) -> bool:
        if number not in self._coupled:
            self._coupled[number] = couples_rows(self.networks[number])
        return self._coupled[number]

    def _planned_rows(self, form: Form, position: int, x: Tensor) -> Tensor | None:
        """Rows of a call that the rule asks for in this step, bool [count], None for all."""
        branches = self.steps.plan(form.rows(x))
        used, count = form.used[position], self.expected[position].count
        first = sum(form.used[:position])
        roles = form.roles[first : first + used]
        if all(role in branches and branches[role].rows is None for role in roles):
            return None
        return torch.cat([mask(branches.get(role), count // used) for role in roles])

    def _against(self, number: int, call: Call, given: Any) -> tuple[Call, int]:
        """The call with the rule's negative prompt in its attention, and its rows per sample."""
        if self.negative is None:
            return call, 1
        branches, form = self.steps.first, self.formula.form
        if self.steps.index:
            x = given if self._next is None else self._next
            branches = self.steps.plan(form.rows(x) if form else x)
        branch, network = branches.get("cond"), self.networks[number]
        if branch is None or branch.mixing is None:
            return call, 1
        mixing = partial(self.negative.call, network, branch.mixing, call)
        return lambda *a, **k: mixing(a, k), self.negative.rows(network)

    def _partial(
        self, number: int, call: Call, args: Any, kwargs: Any, due: Tensor, all_of_it: bool
    ) -> tuple[Any, Tensor, Tensor | None]:
        """Evaluate the rows `due`; a network that cannot be called on fewer rows is evaluated in
        full until the run ends.
        """
        name = type(self.networks[number]).__name__
        try:
            raw = call_on_rows(call, due.nonzero()[:, 0], len(due), args, kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            log.info("%s is evaluated in full: %s", name, error)
            self._coupled[number] = True
            return *whole(call, args, kwargs, len(due)), None
        return *scattered(raw, due, name, all_of_it), due
