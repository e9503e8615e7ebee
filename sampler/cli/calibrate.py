"""`sampler calibrate`: fit per-model parameters of a method from runs over prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sampler.cli.options import Debug, ModelOptions, Quiet, expanded, takes_model_options
from sampler.cli.report import Report

app = typer.Typer(
    help="Fit per-model parameters (LinearAG, momentum number, grid).", no_args_is_help=True
)
Prompts = Annotated[
    str, typer.Option("--prompts", metavar="FILE", help="Text file, one prompt per line.")
]
Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="FILE", callback=expanded, help="JSON file to write."),
]
Seed = Annotated[int, typer.Option(help="Random seed; image i gets SEED + i.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]


@app.command("momentum")
@takes_model_options(leave_out=("drop_encoders",))
def momentum(
    prompts: Prompts,
    out: Out,
    steps: Annotated[
        list[int] | None, typer.Option(help="Sampling steps; repeatable; default: 20.")
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Guidance scale; repeatable; default: the model's own."),
    ] = None,
    guidance: Annotated[str, typer.Option(help="Guidance rule name.")] = "cfg",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=expanded, help="PNG plot of the errors to write."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Find GHVB's momentum number: the best of a grid against runs with ten times the steps.

    The file is valid for this model, and each number in it for its steps, rule, scale and schedule
    only. Use it with --sampler ghvb --set sampler.momentum_number=calibrated:FILE.
    """
    report = Report(quiet=quiet, debug=debug)
    with report.errors():
        if plot is not None:
            _check_matplotlib()
        from sampler.calibration import momentum as calibration
        from sampler.cli.models import load_engine, model_config
        from sampler.runs.lines import read_prompts

        texts = read_prompts(prompts)
        engine = load_engine(model_config(model))
        found = calibration.calibrate_momentum(
            engine,
            texts,
            steps=steps or [20],
            guidance=[
                {"name": guidance, "scale": value} for value in scale or [engine.guidance.scale]
            ],
            seed=seed,
            batch_size=batch_size,
            progress=lambda done, total: report.note(f"{done} of {total} runs"),
        )
        calibration.save(found, out)
        if plot is not None:
            calibration.plot(found, plot)
        report.result(str(out))


@app.command("grid")
@takes_model_options(leave_out=("drop_encoders", "grid"))
def grid(
    prompts: Prompts,
    out: Out,
    sampler: Annotated[str, typer.Option(help="Sampler name or alias.")] = "ddim",
    steps: Annotated[
        list[int] | None, typer.Option(help="Sampling steps; repeatable; default: 20.")
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Guidance scale; repeatable; default: the model's own."),
    ] = None,
    guidance: Annotated[str, typer.Option(help="Guidance rule name.")] = "cfg",
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Find the grid of noise levels: that of several families nearest to ten times the steps.

    Half of the prompts choose a grid, and the other half must confirm it; else the model's own is
    kept. The file is valid for this model, sampler, steps and rule only. Use it with
    --grid calibrated:FILE.
    """
    report = Report(quiet=quiet, debug=debug)
    with report.errors():
        from sampler.calibration.grids import calibrate_grid
        from sampler.calibration.momentum import save
        from sampler.cli.models import load_engine, model_config
        from sampler.runs.lines import read_prompts
        from sampler.samplers.aliases import named

        texts = read_prompts(prompts)
        engine = load_engine(model_config(model))
        found = calibrate_grid(
            engine,
            texts,
            sampler=named(sampler)[0],
            steps=steps or [20],
            guidance=[
                {"name": guidance, "scale": value} for value in scale or [engine.guidance.scale]
            ],
            seed=seed,
            batch_size=batch_size,
            progress=lambda done, total: report.note(f"{done} of {total} runs"),
        )
        save(found, out)
        for entry in found["entries"]:
            report.note(f"{entry['steps']} steps: {entry['grid'] or 'the own grid of the model'}")
        report.result(str(out))


@app.command("linear-ag")
@takes_model_options(leave_out=("drop_encoders",))
def linear_ag(
    prompts: Prompts,
    out: Out,
    sampler: Annotated[str, typer.Option(help="Sampler name (see `sampler list`).")] = "ddim",
    steps: Annotated[int, typer.Option(help="Sampling steps, 1 to 1000.")] = 20,
    scale: Annotated[
        float | None, typer.Option(help="Guidance scale; default: the model's own.")
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    policy: Annotated[
        str | None,
        typer.Option(help="One digit per step, 1 evaluates, 0 predicts, such as 1110100."),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    model: ModelOptions,
) -> None:
    """Fit the unconditional predictions of full CFG runs from earlier steps (rule `linear_ag`).

    The file is valid for this model, sampler, number of steps, scale and negative prompt only.
    """
    report = Report(quiet=quiet, debug=debug)
    with report.errors():
        from sampler.calibration.linear_ag import calibrate_linear_ag
        from sampler.cli.models import load_engine, model_config
        from sampler.runs.lines import read_prompts

        texts = read_prompts(prompts)
        engine = load_engine(model_config(model))
        fitted = calibrate_linear_ag(
            engine,
            texts,
            scale=engine.guidance.scale if scale is None else scale,
            steps=steps,
            sampler=sampler,
            negative=negative,
            policy=None if policy is None else [int(digit) for digit in policy],
            seed=seed,
            batch_size=batch_size,
            progress=lambda done, total: report.note(f"{done} of {total} prompts"),
        )
        fitted.save(out)
        report.result(str(out))


def _check_matplotlib() -> None:
    """Refuse --plot without matplotlib before hours of work. Raises UsageError."""
    import importlib.util

    from sampler.core.errors import UsageError

    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib (pip install matplotlib); leave it out.")
