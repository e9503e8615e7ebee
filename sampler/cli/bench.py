"""`sampler bench`: kernel launches and memory traffic of a step, and the cost of whole runs.

`sampler bench solvers`: accuracy of samplers per evaluation, against a run of many steps.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sampler.cli.options import Debug, Json, ModelOptions, Quiet, takes_model_options
from sampler.cli.report import Report

Row = dict[str, Any]
Model = Annotated[
    str | None,
    typer.Argument(help="Model folder, file or Hub id; default: bundled.", metavar="MODEL"),
]


class _RunsByDefault(TyperGroup):
    """`sampler bench MODEL` is `sampler bench runs MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = bool(args) and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if own else ["runs", *args])


app = typer.Typer(
    cls=_RunsByDefault,
    help="Measure a model: the cost of runs (default) and the accuracy of samplers.",
)


@app.command("runs")
@takes_model_options(leave_out=("path", "drop_encoders", "grid"))
def command(
    path: Model = None,
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
        report.table("step", list(arithmetic()), title=title)
        if not kernels_only:
            timed = list(runs(path, steps, model))
            report.table("run", timed, title=f"one image in {steps} steps")


@app.command("solvers")
@takes_model_options(leave_out=("path", "drop_encoders", "grid"))
def solvers(
    path: Model = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="Text file, one prompt per line."),
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(help="Sampler name or alias; repeatable; default: the usual ones."),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Sampling steps; repeatable; default: 8 and 20.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="Grid of levels by name; repeatable; default: the model's own."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; image i gets SEED + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Compare samplers with runs of ten times the most steps, per number of evaluations.

    distance: of the latents to that run's, relative to it; a deterministic sampler is compared with
    the solution of the ODE, a stochastic one with its own long run on the same noise. spread: size
    of the latents relative to that run's. solver_error: the estimate that each run makes itself.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug)
    with report.errors():
        from sampler.calibration import solvers as calibration
        from sampler.cli.models import load_engine, model_config
        from sampler.runs.lines import read_prompts

        texts = read_prompts(prompts) if prompts else ["a fox"]
        rows: list[Row] = []
        for found in calibration.measured(
            load_engine(model_config({**model, "path": path})),
            texts,
            samplers=sampler or calibration.SAMPLERS,
            steps=steps or (8, 20),
            grids=grid or (None,),
            seed=seed,
            batch_size=batch_size,
            progress=lambda done: report.note(f"{done} runs"),
        ):
            rows.append(calibration.row_of(found))
        report.table("solver", rows, title=f"distance to a long run, {len(texts)} images")


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
