"""Trees of prompt templates: how many prompts one has, prompt number k, and random ones.

Sizes are counted when a tree is built, before any prompt is. Prompt k is the k-th in the order of a
mixed-radix counter, whose last digit varies fastest; a random one is a walk from the root that
draws every choice by itself.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Sequence

MANY = 10**30  # larger sizes are all counted as this

Values = dict[str, str]  # of the variables that were set so far


class Node:
    """A part of a template.

    size: number of prompts, at most MANY. cost: bound of the characters and nodes of one prompt.
    depth: of the tree below.
    """

    def __init__(self, size: int, cost: int, depth: int) -> None:
        self.size, self.cost, self.depth = min(size, MANY), min(cost, MANY), depth

    def text(self, number: int, values: Values) -> str:
        """Prompt `number`, from 0 to size - 1."""
        raise NotImplementedError

    def draw(self, rng: random.Random, values: Values) -> str:
        """A random prompt; uses nothing but `rng.random()`, which is stable between versions."""
        raise NotImplementedError


class Text(Node):
    """Literal text."""

    def __init__(self, literal: str) -> None:
        super().__init__(1, len(literal) + 1, 1)
        self.literal = literal

    def text(self, number: int, values: Values) -> str:
        return self.literal

    def draw(self, rng: random.Random, values: Values) -> str:
        return self.literal


class Concat(Node):
    """Parts one after the other."""

    def __init__(self, parts: Sequence[Node]) -> None:
        size = math.prod(part.size for part in parts)
        super().__init__(size, 1 + sum(p.cost for p in parts), _depth(parts))
        self.parts = parts

    def text(self, number: int, values: Values) -> str:
        digits: list[int] = []
        for part in reversed(self.parts):
            number, digit = divmod(number, part.size)
            digits.append(digit)
        pairs = zip(self.parts, reversed(digits), strict=True)
        return "".join([part.text(digit, values) for part, digit in pairs])

    def draw(self, rng: random.Random, values: Values) -> str:
        return "".join([part.draw(rng, values) for part in self.parts])


class Choice(Node):
    """One of several options, drawn in proportion to their weights."""

    def __init__(self, options: Sequence[Node], weights: Sequence[float]) -> None:
        self.options, self.weights = options, weights
        self._ends = list(itertools.accumulate(option.size for option in options))
        self._weights = list(itertools.accumulate(weights))
        longest = max(option.cost for option in options)
        super().__init__(self._ends[-1], 1 + longest, _depth(options))

    def text(self, number: int, values: Values) -> str:
        index = bisect.bisect_right(self._ends, number)
        before = self._ends[index - 1] if index else 0
        return self.options[index].text(number - before, values)

    def draw(self, rng: random.Random, values: Values) -> str:
        return self.options[drawn(rng, self._weights)].draw(rng, values)


class Selection(Node):
    """`low` to `high` different options in any order, joined by a separator.

    Options are picked one after the other, in proportion to the weights of those left. Prompts are
    numbered by their count of options, then by the set of options, then by its permutation:
    ways[i][k] is the number of prompts that k of the options from i on can form in one order.
    """

    def __init__(
        self,
        options: Sequence[Node],
        weights: Sequence[float],
        low: int,
        high: int,
        separator: str,
    ) -> None:
        self.options, self.weights, self.separator = options, weights, separator
        self.counts = range(low, high + 1)
        self._ways = [[1] + [0] * high]
        for option in reversed(options):
            after = self._ways[-1]
            added = (option.size * after[k - 1] for k in range(1, high + 1))
            row = [min(n + more, MANY) for n, more in zip(after[1:], added, strict=True)]
            self._ways.append([1, *row])
        self._ways.reverse()
        size = sum(math.factorial(k) * self._ways[0][k] for k in self.counts)
        costs = heapq.nlargest(high, [option.cost for option in options])
        super().__init__(size, 1 + sum(costs) + high * (1 + len(separator)), _depth(options))

    def text(self, number: int, values: Values) -> str:
        for k in self.counts:
            here = math.factorial(k) * self._ways[0][k]
            if number < here:
                break
            number -= here
        number, order = divmod(number, math.factorial(k))
        chosen: list[tuple[int, int]] = []  # (option, number of its prompt)
        for index, option in enumerate(self.options):
            left = k - len(chosen)
            if not left:
                break
            rest = self._ways[index + 1][left - 1]
            if number < option.size * rest:
                own, number = divmod(number, rest)
                chosen.append((index, own))
            else:
                number -= option.size * rest
        texts: list[str] = []
        for left in range(k, 0, -1):
            position, order = divmod(order, math.factorial(left - 1))
            index, own = chosen.pop(position)
            texts.append(self.options[index].text(own, values))
        return self.separator.join(texts)

    def draw(self, rng: random.Random, values: Values) -> str:
        left = list(range(len(self.options)))
        texts: list[str] = []
        for _ in range(self.counts[int(rng.random() * len(self.counts))]):
            weights = list(itertools.accumulate(self.weights[k] for k in left))
            index = left.pop(drawn(rng, weights))
            texts.append(self.options[index].draw(rng, values))
        return self.separator.join(texts)


class Assignment(Node):
    """Sets a variable to one prompt of its value, the same wherever it is used; no text itself."""

    def __init__(self, name: str, value: Node) -> None:
        super().__init__(value.size, 1 + value.cost, 1 + value.depth)
        self.name, self.value = name, value

    def text(self, number: int, values: Values) -> str:
        values[self.name] = self.value.text(number, values)
        return ""

    def draw(self, rng: random.Random, values: Values) -> str:
        values[self.name] = self.value.draw(rng, values)
        return ""


class Use(Node):
    """Text of a variable that an `Assignment` has set."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(1, assignment.cost, 1)
        self.name = assignment.name

    def text(self, number: int, values: Values) -> str:
        return values[self.name]

    def draw(self, rng: random.Random, values: Values) -> str:
        return values[self.name]


def drawn(rng: random.Random, ends: Sequence[float]) -> int:
    """Index drawn in proportion to positive weights, given as their cumulative sums."""
    return min(bisect.bisect_right(ends, rng.random() * ends[-1]), len(ends) - 1)


def _depth(nodes: Sequence[Node]) -> int:
    return 1 + max((node.depth for node in nodes), default=0)
