"""`sampler list`: the strategies that exist, with their fields, defaults and references."""

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
_SINGULAR = {kind: plural for plural, kind in KINDS.items()}


def command(
    kind: Annotated[
        str, typer.Argument(help="samplers, guidance, rewards, trainers or schedulers.")
    ],
    as_json: Json = False,
    debug: Debug = False,
    color: Color = "auto",
) -> None:
    """List what there is of a kind, with fields, defaults and references."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        from sampler import registry
        from sampler.errors import UsageError

        plural = _SINGULAR.get(kind, kind)
        if plural not in KINDS:
            raise UsageError(f"Unknown kind {kind!r}{registry.nearest(kind, KINDS)}.")
        entries = schedulers() if plural == "schedulers" else strategies(KINDS[plural], report)
        if as_json:
            for entry in entries:
                report.event("entry", **entry)
        elif not entries:
            report.note(f"There are no {plural} in this version.")
        else:
            _print_table(plural, entries)


def strategies(kind: str, report: Report) -> list[dict[str, Any]]:
    """What `sampler.describe` says of every name; a plug-in that fails to load is told."""
    from sampler import registry

    found = []
    for name in registry.names(kind):
        try:
            entry = registry.describe(kind, name)
        except ValueError as error:
            report.event("warning", message=str(error))
            report.note(f"sampler: {error}")
            continue
        for field in entry["fields"]:
            field["default"] = _plain(field["default"])
        found.append(entry)
    return found


def schedulers() -> list[dict[str, Any]]:
    """The stock diffusers schedulers whose noise levels can be read from a pipeline."""
    vp, edm, flow = "variance preserving", "Karras (EDM)", "flow matching"
    known = {
        "DDIMScheduler": vp,
        "DDPMScheduler": vp,
        "PNDMScheduler": vp,
        "LCMScheduler": vp,
        "EulerDiscreteScheduler": vp,
        "EulerAncestralDiscreteScheduler": vp,
        "HeunDiscreteScheduler": vp,
        "LMSDiscreteScheduler": vp,
        "KDPM2DiscreteScheduler": vp,
        "DPMSolverMultistepScheduler": vp,
        "DPMSolverSinglestepScheduler": vp,
        "UniPCMultistepScheduler": vp,
        "DEISMultistepScheduler": vp,
        "EDMEulerScheduler": edm,
        "EDMDPMSolverMultistepScheduler": edm,
        "FlowMatchEulerDiscreteScheduler": flow,
    }
    return [
        {"kind": "scheduler", "name": name, "summary": f"Noise levels: {process}.", "fields": []}
        for name, process in known.items()
    ]


def _print_table(title: str, entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "what it does", "fields = defaults", title=title, show_lines=True)
    for entry in entries:
        fields = "\n".join(f"{f['name']} = {json.dumps(f['default'])}" for f in entry["fields"])
        about = "\n".join(part for part in (entry["summary"], entry.get("reference")) if part)
        table.add_row(*(Text(_lines(cell)) for cell in (entry["name"], about, fields)))
    Console().print(table)


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _plain(value: Any) -> Any:
    """A default as JSON can hold it."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)
