"""`sampler calibrate momentum`: GHVB's momentum number for a model and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sampler.cli.options import Debug, Quiet
from sampler.cli.report import Report


def command(
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE", help="Text file, one prompt per line.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="JSON to write.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default: bundled.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Repeatable; default 20.")] = None,
    scale: Annotated[
        list[float] | None, typer.Option(help="Repeatable; default: the model's own.")
    ] = None,
    guidance: Annotated[str, typer.Option(help="The rule that the scales are of.")] = "cfg",
    seed: Annotated[int, typer.Option(help="Image i has seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="PNG of the errors.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find GHVB's momentum number: the best of a grid against runs with ten times the steps.

    The file is valid for this model, and in it each number for its steps, rule, scale and schedule
    only. Use it with --sampler ghvb --set sampler.momentum_number=calibrated:FILE.
    """
    report = Report(quiet=quiet, debug=debug)
    with report.errors():
        if plot is not None:
            _check_matplotlib()
        from sampler.calibration import momentum as momentum_calibration
        from sampler.loading import load
        from sampler.runs.prompts import read_prompts

        texts = read_prompts(prompts)
        engine = load(model)
        scales = scale or [engine.guidance.scale]
        found = momentum_calibration.calibrate_momentum(
            engine,
            texts,
            steps=steps or [20],
            guidance=[{"name": guidance, "scale": value} for value in scales],
            seed=seed,
            batch_size=batch_size,
            progress=lambda done, total: report.note(f"{done} of {total} runs"),
        )
        momentum_calibration.save(found, out)
        if plot is not None:
            momentum_calibration.plot(found, plot)
        report.result(str(out))


def _check_matplotlib() -> None:
    """Before hours of work, not after them. Raises SamplerError (2)."""
    import importlib.util

    from sampler.errors import UsageError

    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib (pip install matplotlib); leave it out.")
