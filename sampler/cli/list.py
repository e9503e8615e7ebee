"""`sampler list`: registered strategies with fields, defaults and references."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from sampler.cli.options import Color, Debug, Json
from sampler.cli.report import Report, printable

KINDS = {
    "samplers": "sampler",
    "guidance": "guidance",
    "rewards": "reward",
    "trainers": "trainer",
    "schedulers": "scheduler",
}
_PROCESSES = {
    "vp": "variance preserving",
    "edm": "Karras (EDM)",
    "flow": "flow matching",
    "consistency": "consistency model",
}
Entry = dict[str, Any]


def command(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[samplers|guidance|rewards|trainers|schedulers|NAME]",
            help="A kind, or the name of one strategy.",
            autocompletion=lambda incomplete: [k for k in KINDS if k.startswith(incomplete)],
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    color: Color = "auto",
) -> None:
    """List samplers, guidance rules, rewards, trainers or schedulers."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        if what is None:
            for plural in KINDS:
                report.event("kind", name=plural)
                report.result(plural)
            return
        title, entries = _entries(what, report)
        if as_json:
            for entry in entries:
                report.event("entry", **entry)
        else:
            _print_table(title, entries)


def _entries(what: str, report: Report) -> tuple[str, list[Entry]]:
    """(title, entries) of a kind, in singular or plural, or of one name in every kind."""
    from sampler import registry
    from sampler.core.errors import UsageError

    for plural, kind in KINDS.items():
        if what in (plural, kind):
            return plural, strategies(kind, report) if kind in registry.KINDS else schedulers()
    names = {kind: registry.names(kind) for kind in registry.KINDS}
    entries = [_entry(kind, what) for kind, listed in names.items() if what in listed]
    if not entries:
        near = registry.suggestion(
            what, [*KINDS, *(name for known in names.values() for name in known)]
        )
        hint = near if near.startswith(" (") else f"; known: {', '.join(KINDS)}, or a name in them"
        raise UsageError(f"Unknown kind or name {what!r:.60}{hint}.")
    return what, entries


def strategies(kind: str, report: Report) -> list[Entry]:
    """Descriptions of every name of a kind; a warning for a plug-in that fails to load."""
    from sampler import registry

    found: list[Entry] = []
    for name in registry.names(kind):
        try:
            found.append(_entry(kind, name))
        except ValueError as error:
            report.event("warning", message=str(error))
            report.note(f"sampler: {error}")
    return found


def schedulers() -> list[Entry]:
    """Stock diffusers schedulers whose noise levels can be read from a pipeline."""
    from sampler.core.schedulers import SCHEDULERS

    return [
        {
            "kind": "scheduler",
            "name": name,
            "summary": f"Noise levels: {_PROCESSES[process]}.",
            "fields": [],
        }
        for name, process in SCHEDULERS.items()
    ]


def _entry(kind: str, name: str) -> Entry:
    from sampler import registry

    entry = registry.describe(kind, name)
    for field in entry["fields"]:
        field["default"] = _plain(field["default"])
    return entry


def _print_table(title: str, entries: list[Entry]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "summary", "fields = defaults, ranges", title=title, show_lines=True)
    for entry in entries:
        fields = "\n".join(
            f"{f['name']} = {json.dumps(f['default'])}" + (f"  {f['range']}" if f["range"] else "")
            for f in entry["fields"]
        )
        about = "\n".join(part for part in (entry["summary"], entry.get("reference")) if part)
        table.add_row(*(Text(_lines(cell)) for cell in (entry["name"], about, fields)))
    Console().print(table)


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _plain(value: Any) -> Any:
    """A default in a form that JSON has."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)
