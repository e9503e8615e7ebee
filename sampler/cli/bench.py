"""`sampler bench`: kernel launches and memory traffic of a step, and the cost of whole runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from sampler.cli.options import Debug, Json, ModelOptions, takes_model_options
from sampler.cli.report import Report

Row = dict[str, Any]


@takes_model_options(leave_out=("path", "drop_encoders", "grid"))
def command(
    path: Annotated[
        str | None,
        typer.Argument(help="Model folder, file or Hub id; default: bundled.", metavar="MODEL"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps of the timed runs.", min=1)] = 20,
    kernels_only: Annotated[
        bool, typer.Option("--kernels", help="Count kernel launches only; load no model.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Count kernel launches of guidance and samplers, and time runs against the stock pipeline."""
    report = Report(as_json=as_json, debug=debug)
    with report.errors():
        title = "arithmetic of one step: kernel launches, bytes per latent element"
        _print_table(report, "step", title, list(arithmetic()))
        if not kernels_only:
            _print_table(
                report, "run", f"one image in {steps} steps", list(runs(path, steps, model))
            )


def arithmetic() -> Iterator[Row]:
    """Counts of every benchmark case; without Triton, of the reference only."""
    from sampler.core.benchmark import CASES, count

    has_triton = importlib.util.find_spec("triton") is not None
    for case in CASES:
        fused = count(case, "triton") if has_triton else None
        eager = count(case, "reference")
        yield {
            "step": case.name,
            "kernels": fused and fused.kernels,
            "bytes": fused and round(fused.bytes, 1),
            "least": case.least,
            "eager launches": eager.others,
            "eager bytes": round(eager.bytes, 1),
        }


def runs(path: str | None, steps: int, model: ModelOptions) -> Iterator[Row]:
    """Cost of whole runs with several rules and of the stock pipeline; the faster of two runs."""
    import sampler
    from sampler.cli.models import model_config
    from sampler.config.model import load_arguments
    from sampler.core.benchmark import cost

    config = model_config({**model, "path": path})
    engine = sampler.load(config.path, **load_arguments(config))
    pipe, scale = engine.pipeline.pipe, engine.guidance.scale
    options: Row = {"seeds": 0, "steps": steps, "output": "latent", "sampler": "ddim"}
    rules: Row = {
        "no guidance": "none",
        "cfg": {"name": "cfg", "scale": scale},
        "apg": {"name": "apg", "scale": scale},
        "adaptive": {"name": "adaptive", "rule": {"name": "cfg", "scale": scale}},
    }
    for name, rule in rules.items():
        result, row = cost(lambda rule=rule: engine.generate("a fox", guidance=rule, **options))
        yield {"run": name, "nfe": result.nfe[0], **row, **_per_step(row, steps)}
    stock: Row = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    _, row = cost(lambda: pipe("a fox", **stock))
    yield {"run": f"{type(pipe).__name__}, cfg", "nfe": 2 * steps, **row, **_per_step(row, steps)}


def _per_step(row: Row, steps: int) -> Row:
    return {"ms per step": round(1e3 * row["seconds"] / steps, 2)}


def _print_table(report: Report, kind: str, title: str, rows: list[Row]) -> None:
    for row in rows:
        report.event(kind, **row)
    names = list(rows[0])
    cells = [names, *(["" if v is None else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    report.result(title)
    for line in cells:
        report.result("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)))
