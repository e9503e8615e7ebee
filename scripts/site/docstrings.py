"""Docstrings of this project as Markdown, and the griffe extension that shows them so.

A docstring has a summary, equations (indented by four), prose, and fields as "name: what it is",
one or several to a line.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from griffe import Extension

NAMES = (
    r"(?:\w+|\w+\([\w, ]*\))(?:, \w+)*"  # one field or several, or a call such as progress(done)
)


@dataclass
class Docstring:
    """The parts of a docstring: equations and prose in their order, as Markdown; fields by name."""

    summary: str = ""
    body: list[str] = field(default_factory=list[str])
    fields: dict[str, str] = field(default_factory=dict[str, str])


def parsed(text: str, names: Iterable[str]) -> Docstring:
    """A docstring, split; only `names` are fields, whatever else a colon follows."""
    known = set(names)
    summary, *rest = re.split(r"\n\s*\n", inspect.cleandoc(text))
    found = Docstring(escaped(_joined(summary.splitlines())))
    for block in rest:
        lines = block.splitlines()
        if lines[0].startswith("    ") and not found.fields:
            found.body.append(fenced(lines))
        elif (first := re.match(rf"({NAMES}): ", lines[0])) and _are(first[1], known):
            found.fields |= _fields(_joined(lines), known)
        else:
            found.body += _mixed(lines)
    return found


def _are(names: str, known: set[str]) -> bool:
    return all(name in known for name in _each(names))


def _each(names: str) -> list[str]:
    return re.sub(r"\([^)]*\)", "", names).split(", ")


def _fields(text: str, known: set[str]) -> dict[str, str]:
    """{name: what it is} of a paragraph; names that share a text all get it."""
    starts = [
        found
        for found in re.finditer(rf"(?:^|(?<=[.;] ))({NAMES}): ", text)
        if _are(found[1], known)
    ]
    ends = [found.start() for found in starts[1:]] + [len(text)]
    return {
        name: escaped(text[start.end() : end].strip().rstrip(";").rstrip("."))
        for start, end in zip(starts, ends, strict=True)
        for name in _each(start[1])
    }


def _mixed(lines: list[str]) -> list[str]:
    """Prose, with the equations inside it that no empty line sets off."""
    parts: list[str] = []
    while lines:
        equation = lines[0].startswith("    ")
        count = next((i for i, x in enumerate(lines) if x.startswith("    ") != equation), None)
        taken, lines = lines[:count], [] if count is None else lines[count:]
        parts.append(fenced(taken) if equation else escaped(_joined(taken)))
    return parts


def fenced(lines: Iterable[str]) -> str:
    """An equation as a code block: its alignment is kept, and no network is needed to show it."""
    return "```text\n" + inspect.cleandoc("\n" + "\n".join(lines)) + "\n```"


def escaped(text: str) -> str:
    """Prose whose formulas Markdown would read as emphasis or as a tag; code is left alone."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<!\w)_|\*", lambda found: "\\" + found[0], parts[i])
        parts[i] = parts[i].replace("<", "&lt;").replace("|", "&#124;")
    return "".join(parts)


def _joined(lines: Iterable[str]) -> str:
    return " ".join(line.strip() for line in lines)


class Docstrings(Extension):
    """Shows fields and parameters as a list, and equations as blocks."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrites the docstring of every object that has one, once."""
        if obj.is_alias or obj.docstring is None:
            return
        obj.docstring.value = markdown(obj.docstring.value, _known(obj))


def _known(obj: Any) -> set[str]:
    """Return possible field names: parameters of a function, attributes of a class."""
    names = (
        {p.name.lstrip("*") for p in getattr(obj, "parameters", ())} if obj.is_function else set()
    )
    return names | {n for n, m in obj.members.items() if obj.is_class and m.is_attribute}


def markdown(text: str, names: Iterable[str]) -> str:
    """A docstring as Markdown: fields come first after the summary, as a list."""
    found = parsed(text, names)
    fields = "\n".join(f"- `{name}`: {about}." for name, about in found.fields.items())
    return "\n\n".join(part for part in [found.summary, fields, *found.body] if part)
