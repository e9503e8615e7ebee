"""`sampler calibrate linear-ag`: the coefficients of LinearAG for a model and a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sampler.cli.options import Debug, Quiet
from sampler.cli.report import Report


def command(
    prompts: Annotated[
        Path, typer.Option("--prompts", metavar="FILE", help="Text file, one prompt per line.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="JSON to write.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; default: bundled.")] = None,
    sampler: Annotated[str, typer.Option(help="Its name; see `sampler list`.")] = "ddim",
    steps: Annotated[int, typer.Option(help="Network evaluations, 1 to 1000.")] = 20,
    scale: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    negative: Annotated[str, typer.Option(help="The unconditional prompt.")] = "",
    policy: Annotated[
        str | None, typer.Option(help="A 1 (evaluate) or 0 (predict) per step, like 1110100.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i has seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit the unconditional passes of full CFG runs from their past (guidance `linear_ag`).

    The file is valid for this model, sampler, number of steps, scale and negative prompt only.
    """
    report = Report(quiet=quiet, debug=debug)
    with report.errors():
        from sampler.calibration.linear_ag import calibrate_linear_ag
        from sampler.loading import load

        lines = prompts.read_text(encoding="utf-8").splitlines()
        texts = [line.strip() for line in lines if line.strip()]
        engine = load(model)
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
