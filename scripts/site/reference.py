"""The reference pages and the index of papers, from the registry, docs/reference/notes.yaml and the
counted rows: nothing on them is typed twice.

    python -m scripts.site.reference

tests/docs/test_reference.py compares the committed pages with what this would write.
"""

from __future__ import annotations

import csv
import re
import typing
from dataclasses import fields
from functools import cache
from posixpath import relpath
from typing import Any

import yaml

from sampler import registry
from scripts.site.docstrings import Docstring, escaped, parsed
from scripts.site.fields import plain, type_name, value
from scripts.site.papers import ROOT, linked, papers_page

KINDS = {
    "sampler": ("Samplers", "How to move one level down, given one prediction of the network."),
    "guidance": ("Guidance rules", "Which predictions a step needs, and how one is made of them."),
    "reward": ("Rewards", "A score per image and prompt, higher is better."),
    "trainer": ("Trainers", "How a model is adapted to a reward, or distilled."),
}
FIGURES = "docs/figures/reference"
NO_FIGURE = "No picture: it needs published weights, which are not part of the package."


@cache
def notes() -> dict[str, Any]:
    """Load the hand-written notes: per kind and name, and about papers."""
    return yaml.safe_load((ROOT / "docs/reference/notes.yaml").read_text(encoding="utf-8"))


def run_of(kind: str, name: str) -> dict[str, Any]:
    """The settings of a strategy's picture: those of its kind, and its own."""
    return {
        **notes()["runs"].get(kind, {}),
        kind: {"name": name},
        **note(kind, name).get("run", {}),
    }


def note(kind: str, name: str) -> dict[str, Any]:
    """Return the entry of a strategy. Raises ValueError if there is none."""
    found = notes()[kind].get(name)
    if found is None:
        raise ValueError(f"docs/reference/notes.yaml has no {kind} {name!r}; add its entry.")
    return found


@cache
def counted() -> dict[tuple[str, str], dict[str, str]]:
    """Read the NFE counts (`python -m scripts.site.figures count`)."""
    text = (ROOT / FIGURES / "rows.csv").read_text(encoding="utf-8").splitlines()
    return {(row["kind"], row["name"]): row for row in csv.DictReader(text)}


def docstring(kind: str, name: str) -> Docstring:
    """Return a strategy's docstring, with inherited fields filled in."""
    cls = registry.lookup(kind, name)
    known = [f.name for f in fields(cls) if f.init]
    found = parsed(cls.__doc__ or "", known)
    for part in list(found.body):
        if other := re.fullmatch(r"The other fields are those of `(\w+)`\.", part):
            found.fields = {**docstring(kind, other[1]).fields, **found.fields}
            found.body.remove(part)
    for key, text in found.fields.items():
        if other := re.match(r"as for `(\w+)`[;,.]?\s*", text):
            rest = text[other.end() :]
            meant = docstring(kind, other[1]).fields[key]
            found.fields[key] = f"{meant}. {rest[:1].upper()}{rest[1:]}" if rest else meant
    return found


def page(kind: str, name: str) -> str:
    """The page of a strategy, at docs/reference/KIND/NAME.md."""
    doc, entry = docstring(kind, name), note(kind, name)
    verified = "Verified" if entry.get("status", "verified") == "verified" else "Reconstructed"
    checks = "".join(f"- {linked(check, '../..')}\n" for check in entry["checks"])
    parts = [
        f"# {name}\n\n{doc.summary}",
        *(_prose_of(kind, name, part) for part in doc.body),
        _figure(kind, name),
        f"## Fields\n\n{_table(kind, name, doc)}",
        f"## When to use it\n\n{_prose_of(kind, name, escaped(entry['use']))}",
        f"## When not\n\n{_prose_of(kind, name, escaped(entry['avoid']))}",
        f"## Cost\n\n{_cost(kind, name)}",
        f"## {verified} by\n\n{_prose_of(kind, name, escaped(entry['verified']))}\n\n{checks}",
        f"## Source\n\n{_source(kind, name)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _figure(kind: str, name: str) -> str:
    entry = note(kind, name)
    own = f"{FIGURES}/{kind}_{name}.png"
    path = entry.get("figure", own)
    if not (ROOT / path).exists():
        return entry.get("no_figure", NO_FIGURE)
    caption = (
        _prose_of(kind, name, escaped(entry["caption"]))
        if "caption" in entry
        else _caption(kind, name)
    )
    return f"![What {name} makes]({relpath(path, 'docs/reference/' + kind)})\n\n{caption}"


def _caption(kind: str, name: str) -> str:
    run = run_of(kind, name)
    if kind == "reward":
        told = f"`{plain(run['reward'])}`"
        return f"Images of the bundled model, the lowest score left, the highest right: {told}."
    model = run.get("model", "bundled")
    told = ", ".join(f"{key} `{plain(run[key])}`" for key in ("sampler", "guidance", "steps"))
    about = (
        "measured, and restored" if name == "reddiff" else "the same prompts and seeds throughout"
    )
    return f"The model `{model}`, {about}: {told}."


def _table(kind: str, name: str, doc: Docstring) -> str:
    cls = registry.lookup(kind, name)
    described = registry.describe(kind, name)["fields"]
    if not described:
        return "None."
    types = typing.get_type_hints(cls)
    required = {f.name for f in fields(cls) if f.default is f.default_factory}
    lines = ["| field | type | default | range | meaning |", "|---|---|---|---|---|"]
    for field in described:
        key = field["name"]
        if key not in doc.fields:
            raise ValueError(f"The docstring of the {kind} {name!r} says nothing of {key!r}.")
        default = "required" if key in required else f"`{value(field['default'])}`"
        text = re.sub(r"^(a|[a-z]{2,})(?=[ ,;])", lambda w: w[0].capitalize(), doc.fields[key])
        lines.append(
            f"| `{key}` | {type_name(types[key])} | {default} | {escaped(field['range'])} "
            f"| {_prose_of(kind, name, text)}. |"
        )
    return "\n".join(lines)


def _cost(kind: str, name: str) -> str:
    row = counted().get((kind, name))
    told = []
    if row:
        each = float(row["rows"]) / int(row["steps"])
        rows = "row" if row["rows"] == "1" else "rows"
        told.append(
            f"{row['rows']} {rows} of the network per image of {row['steps']} "
            f"{'step' if row['steps'] == '1' else 'steps'}, counted: {each:g} a step."
        )
    if "cost" in note(kind, name):
        told.append(note(kind, name)["cost"].strip())
    return _prose_of(kind, name, escaped(" ".join(told)))


def _source(kind: str, name: str) -> str:
    cls = registry.lookup(kind, name)
    text = escaped(registry.describe(kind, name)["reference"] or "No paper.")
    text = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    home = linked(cls.__module__.replace(".", "/") + ".py", "../..")
    return f"{text.rstrip('.')}.\n\nImplemented in {home}; all papers: [index](../../papers.md)."


def _prose_of(kind: str, name: str, text: str) -> str:
    """Prose of a page: names of other strategies and docs/PAGE.md become links."""
    if text.startswith("```"):
        return text

    def named(found: re.Match[str]) -> str:
        homes = [k for k in (kind, *KINDS) if found[1] in registry.names(k)]
        if not homes or found[1] == name:
            return found[0]
        return f"[`{found[1]}`](../{homes[0]}/{found[1]}.md)"

    text = re.sub(r"`(\w+)`", named, text.strip())
    return re.sub(r"docs/(\w+)\.md", r"[\1](../../\1.md)", text)


def index(kind: str) -> str:
    """The list of a kind, at docs/reference/KIND/index.md."""
    title, about = KINDS[kind]
    rows = kind in ("sampler", "guidance")
    head = "| name | what it does |" + (" NFE per step | |" if rows else " |")
    lines = [head, "|---|---|" + ("---|---|" if rows else "---|")]
    for name in registry.names(kind):
        cells = [f"[`{name}`]({name}.md)", docstring(kind, name).summary]
        row = counted().get((kind, name))
        if rows:
            cells.append(f"{float(row['rows']) / int(row['steps']):g}" if row else "–")
        path = f"{FIGURES}/{kind}_{name}.png"
        picture = (
            f"![]({relpath(path, 'docs/reference/' + kind)})" if (ROOT / path).exists() else ""
        )
        cells.append(picture)
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"# {title}\n\n{about}\n\n{table}\n"


def pages() -> dict[str, str]:
    """Return {path: text} of all generated pages."""
    found = {f"docs/reference/{kind}/index.md": index(kind) for kind in KINDS}
    for kind in KINDS:
        found |= {f"docs/reference/{kind}/{n}.md": page(kind, n) for n in registry.names(kind)}
    return {**found, "docs/papers.md": papers_page(notes())}


def main() -> None:
    for path, text in pages().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
