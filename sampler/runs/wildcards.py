"""Prompt templates: `__name__` is a line of name.txt, `{a|b}` one of the alternatives.

A template is parsed into a tree in linear time, without recursion, and its prompts are counted
before any is built. Prompt k is the k-th in the order of a mixed-radix counter; a random one is a
pure function of (seed, job index). (The library dynamicprompts bounds neither time nor count.)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from sampler import registry
from sampler.core.errors import SamplerError, UsageError
from sampler.runs.tables import read_table

MAX_DEPTH = 20
MAX_PARTS = 10_000
MAX_CHARS = 1_000_000
_NAME = re.compile(r"__([A-Za-z0-9_\-/]+?)__")
_TOKEN = re.compile(r"__[A-Za-z0-9_\-/]+?__|[{|}]|\\[{|}]")


class _Node:
    """One of several `choices`, or the concatenation of `parts`."""

    def __init__(self, choices: list[_Node] | None = None) -> None:
        self.choices = choices
        self.parts: list[str | _Node] = []
        self._size: tuple[int, int] | None = None

    def size(self) -> tuple[int, int]:
        """(number of prompts, upper bound of the longest in characters); computed once."""
        if self._size is None:
            if self.choices is not None:
                sizes = [choice.size() for choice in self.choices]
                self._size = sum(n for n, _ in sizes), max(long for _, long in sizes)
            else:
                sizes = [(1, len(p)) if isinstance(p, str) else p.size() for p in self.parts]
                self._size = math.prod(n for n, _ in sizes), sum(long for _, long in sizes)
        return self._size

    def text(self, number: int) -> str:
        """Prompt `number`; the last part varies fastest."""
        if self.choices is not None:
            for choice in self.choices:
                if number < choice.size()[0]:
                    return choice.text(number)
                number -= choice.size()[0]
            raise IndexError(number)
        done: list[str] = []
        for part in reversed(self.parts):
            if isinstance(part, str):
                done.append(part)
            else:
                number, rest = divmod(number, part.size()[0])
                done.append(part.text(rest))
        return "".join(reversed(done))


class Wildcards:
    """Templates of a run. folder: of wildcard files; None if there are none."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: dict[str, _Node] = {}

    def count(self, template: str) -> int:
        """Number of prompts of a template. Raises UsageError for an invalid template."""
        return 1 if _is_plain(template) else self._tree(template).size()[0]

    def all(self, template: str, limit: int) -> Iterator[str]:
        """Yield every prompt of a template. Raises UsageError for more than `limit`."""
        if _is_plain(template):
            yield template
            return
        tree = self._tree(template)
        if (total := tree.size()[0]) > limit:
            shown = f"{total:,}" if total < 10**15 else "more than 10^15"
            raise UsageError(f"{template!r:.60} has {shown} prompts; the limit is {limit:,}.")
        for number in range(total):
            yield tree.text(number)

    def random(self, template: str, seed: int, index: int) -> str:
        """Draw one prompt uniformly, as a pure function of (seed, index)."""
        if _is_plain(template):
            return template
        tree = self._tree(template)
        digest = hashlib.sha256(f"wildcard\n{seed}\n{index}".encode()).digest()
        return tree.text(int.from_bytes(digest, "big") % tree.size()[0])

    def _tree(self, template: str) -> _Node:
        tree = self._parse(template, (), template)
        if tree.size()[1] > MAX_CHARS:
            raise UsageError(f"{template!r:.60}: its prompts can grow too long.")
        return tree

    def _parse(self, text: str, open_names: tuple[str, ...], shown: str) -> _Node:
        """Parse a template. open_names: wildcard files that contain it, innermost last."""
        stack = [_Node()]
        position = 0
        for number, token in enumerate(_TOKEN.finditer(text)):
            if number > MAX_PARTS:
                raise UsageError(f"{shown!r:.60}: more than {MAX_PARTS} variants.")
            if position < token.start():
                stack[-1].parts.append(text[position : token.start()])
            position = token.end()
            _take(token[0], stack, shown, lambda name: self._file(name, open_names, shown))
        if len(stack) > 1:
            raise UsageError(f"{shown!r:.60}: a {{ is never closed (\\{{ is a plain one).")
        stack[0].parts.append(text[position:])
        return stack[0]

    def _file(self, name: str, open_names: tuple[str, ...], shown: str) -> _Node:
        if name in open_names or len(open_names) >= MAX_DEPTH:
            chain = " in ".join(f"__{n:.40}__" for n in (name, *reversed(open_names)))
            raise UsageError(f"{shown!r:.60}: the wildcard contains itself: {chain:.200}.")
        if name not in self._files:
            lines = self._lines(name, shown)
            choices = [self._parse(line, (*open_names, name), shown) for line in lines]
            self._files[name] = _Node(choices)
        return self._files[name]

    def _lines(self, name: str, shown: str) -> list[str]:
        if self._folder is None:
            raise UsageError(
                f"{shown!r:.60}: __{name:.60}__ needs a folder of wildcard files "
                "(prompts.wildcards, or --wildcards).",
            )
        if not self._folder.is_dir():
            raise UsageError(f"--wildcards: {self._folder} is not a folder.")
        path = self._folder / f"{name}.txt"
        inside = path.resolve().is_relative_to(self._folder.resolve())
        if name.startswith("/") or not inside or not path.is_file():
            known = [p.stem for p in sorted(self._folder.glob("*.txt"))]
            hint = registry.suggestion(name, known) if known else ""
            raise UsageError(f"{shown!r:.60}: unknown wildcard __{name:.60}__{hint}.")
        lines = []
        for _, cells, *_ in read_table(path):
            if isinstance(cells, SamplerError):
                raise cells
            lines.append(cells["prompt"])
        if not lines:
            raise UsageError(f"{path}: the file has no line.")
        return lines


def _take(token: str, stack: list[_Node], shown: str, file: Callable[[str], _Node]) -> None:
    """Process one token; the stack alternates between sequences and the choices around them."""
    if token.startswith("\\"):
        stack[-1].parts.append(token[1])
    elif token == "{":
        if len(stack) > 2 * MAX_DEPTH:
            raise UsageError(f"{shown!r:.60}: variants are nested more than {MAX_DEPTH} deep.")
        stack += [_Node([]), _Node()]
    elif token == "|" and len(stack) > 1:
        _choices(stack).append(stack.pop())
        stack.append(_Node())
    elif token == "}" and len(stack) > 1:
        _choices(stack).append(stack.pop())
        choice = stack.pop()
        stack[-1].parts.append(choice)
    elif token in "|}":
        stack[-1].parts.append(token)
    else:
        stack[-1].parts.append(file(token[2:-2]))


def _choices(stack: list[_Node]) -> list[_Node]:
    choices = stack[-2].choices
    assert choices is not None
    return choices


def _is_plain(template: str) -> bool:
    return "{" not in template and not _NAME.search(template)
