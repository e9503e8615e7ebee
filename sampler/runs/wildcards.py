"""Wildcard files, and the prompts of templates: all of them, counted first, or random ones.

A random prompt is a pure function of (seed, job index). The library dynamicprompts, whose syntax
`sampler.runs.template_parser` reads, bounds neither time nor count, leaves unknown wildcards in
the prompt, and cuts weights to integers.
"""

from __future__ import annotations

import fnmatch
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

from sampler import registry
from sampler.core.errors import UsageError
from sampler.runs.tables import read_lines
from sampler.runs.template_parser import Option, TemplateParser
from sampler.runs.templates import Choice, Node

MAX_NESTED = 20  # files inside of files
MAX_COST = 1_000_000  # characters and nodes of a prompt
_NAME = re.compile(r"[A-Za-z0-9_\-/*?]+$")


class Wildcards:
    """Templates of a run. folder: of wildcard files; None if there are none."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: dict[str, list[Option]] = {}
        self._choices: dict[str, Choice] = {}
        self._last: tuple[str, Node] | None = None

    def count(self, template: str) -> int:
        """Number of prompts of a template. Raises UsageError for an invalid template."""
        return 1 if _is_plain(template) else self._tree(template).size

    def all(self, template: str, limit: int) -> Iterator[str]:
        """Yield every prompt of a template. Raises UsageError for more than `limit`."""
        if _is_plain(template):
            yield template
            return
        tree = self._tree(template)
        if (total := tree.size) > limit:
            shown = f"{total:,}" if total < 10**15 else "more than 10^15"
            raise UsageError(f"{template!r:.60} has {shown} prompts; the limit is {limit:,}.")
        for number in range(total):
            yield tree.text(number, {})

    def random(self, template: str, seed: int, index: int) -> str:
        """Draw one prompt, every choice by its weights, as a pure function of (seed, index)."""
        if _is_plain(template):
            return template
        digest = hashlib.sha256(f"wildcard\n{seed}\n{index}".encode()).digest()
        return self._tree(template).draw(random.Random(int.from_bytes(digest, "big")), {})

    def _tree(self, template: str) -> Node:
        if self._last is None or self._last[0] != template:
            parser = TemplateParser(template, lambda name: self._choice(name, (), template))
            tree = parser.parse(template)
            if tree.cost > MAX_COST:
                raise UsageError(f"{template!r:.60}: its prompts can grow too long.")
            self._last = template, tree
        return self._last[1]

    def _choice(self, name: str, open_names: tuple[str, ...], shown: str) -> Choice:
        """Choice of the lines of a wildcard. open_names: files that contain it, innermost last."""
        if name not in self._choices:
            options: list[Option] = []
            for match in self._matching(name, shown):
                options += self._file(match, open_names, shown)
            parser = TemplateParser(shown, self._choices.__getitem__)
            self._choices[name] = parser.choice(options)
        return self._choices[name]

    def _file(self, name: str, open_names: tuple[str, ...], shown: str) -> list[Option]:
        if name in open_names or len(open_names) >= MAX_NESTED:
            chain = " in ".join(f"__{n:.40}__" for n in (name, *reversed(open_names)))
            raise UsageError(f"{shown!r:.60}: the wildcard contains itself: {chain:.200}.")
        if name not in self._files:
            inside = (*open_names, name)
            parser = TemplateParser(shown, lambda inner: self._choice(inner, inside, shown))
            self._files[name] = [parser.option(line) for line in self._lines(name)]
        return self._files[name]

    def _matching(self, name: str, shown: str) -> list[str]:
        """Names of the wildcard files that a name or pattern matches."""
        if not _NAME.match(name):
            raise UsageError(
                f"{shown!r:.60}: __{name:.60}__ is not a wildcard name; names are letters, digits, "
                r"_ - / and the patterns * and ? (\__ begins plain text)."
            )
        if self._folder is None:
            raise UsageError(
                f"{shown!r:.60}: __{name:.60}__ needs a folder of wildcard files "
                "(prompts.wildcards, or --wildcards).",
            )
        if not self._folder.is_dir():
            raise UsageError(f"--wildcards: {self._folder} is not a folder.")
        paths = sorted(path for path in self._folder.rglob("*.txt") if path.is_file())
        root = self._folder.resolve()
        known = [
            path.relative_to(self._folder).with_suffix("").as_posix()
            for path in paths
            if path.resolve().is_relative_to(root)
        ]
        found = [each for each in known if fnmatch.fnmatchcase(each, name)]
        if not found:
            hint = registry.suggestion(name, known[:100]) if known else ""
            raise UsageError(f"{shown!r:.60}: unknown wildcard __{name:.60}__{hint}.")
        return found

    def _lines(self, name: str) -> list[str]:
        path = Path(self._folder or "") / f"{name}.txt"
        lines = list(read_lines(path))
        if not lines:
            raise UsageError(f"{path}: the file has no line.")
        return lines


def _is_plain(template: str) -> bool:
    return "{" not in template and "__" not in template
