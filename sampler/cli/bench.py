"""`sampler bench`: what a step's arithmetic launches and moves, and what a run costs here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from sampler.cli.options import Debug, Json
from sampler.cli.report import Report

Row = dict[str, Any]


def command(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub name of a model; the bundled one.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the timed runs.", min=1)] = 20,
    kernels_only: Annotated[
        bool, typer.Option("--kernels", help="Only the arithmetic; no model is loaded.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count the launches of guidance and samplers, and time runs against the stock pipeline."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        title = "one step's arithmetic: launches, and bytes per latent element"
        _tell(report, "step", title, list(arithmetic()))
        if not kernels_only:
            _tell(report, "run", f"one image in {steps} steps", list(runs(model, steps)))


def arithmetic() -> Iterator[Row]:
    """Every case of the benchmark; our columns are empty where Triton is not installed."""
    from sampler.core.benchmark import CASES, count

    ours = importlib.util.find_spec("triton") is not None
    for case in CASES:
        fused = count(case, "triton") if ours else None
        eager = count(case, "reference")
        yield {
            "step": case.name,
            "kernels": fused and fused.kernels,
            "bytes": fused and round(fused.bytes, 1),
            "least": case.least,
            "eager launches": eager.others,
            "eager bytes": round(eager.bytes, 1),
        }


def runs(model: str | None, steps: int) -> Iterator[Row]:
    """Whole runs of a model: ours with some rules, and the stock pipeline; the faster of two."""
    import sampler
    from sampler.core.benchmark import cost

    engine = sampler.load(model)
    pipe, scale = engine.pipeline.pipe, engine.guidance.scale
    given: Row = {"seeds": 0, "steps": steps, "output": "latent", "sampler": "ddim"}
    rules: Row = {
        "no guidance": "none",
        "cfg": {"name": "cfg", "scale": scale},
        "apg": {"name": "apg", "scale": scale},
        "adaptive": {"name": "adaptive", "rule": {"name": "cfg", "scale": scale}},
    }
    for name, rule in rules.items():
        result, row = cost(lambda rule=rule: engine.generate("a fox", guidance=rule, **given))
        yield {"run": name, "nfe": result.nfe[0], **row, **_per_step(row, steps)}
    stock: Row = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    _, row = cost(lambda: pipe("a fox", **stock))
    yield {"run": f"{type(pipe).__name__}, cfg", "nfe": 2 * steps, **row, **_per_step(row, steps)}


def _per_step(row: Row, steps: int) -> Row:
    return {"ms per step": round(1e3 * row["seconds"] / steps, 2)}


def _tell(report: Report, kind: str, title: str, rows: list[Row]) -> None:
    for row in rows:
        report.event(kind, **row)
    names = list(rows[0])
    cells = [names, *(["" if v is None else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    report.result(title)
    for line in cells:
        report.result("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)))
