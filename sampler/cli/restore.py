"""`sampler restore`: blurred, small or damaged images to a run folder of restorations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli.options import (
    Assignments,
    ConfigFiles,
    Debug,
    Download,
    Json,
    ModelOptions,
    Quiet,
    Verbose,
    assigned,
    complete_names,
    image_option,
    model_settings,
    strategy_option,
    takes_model_options,
)
from sampler.cli.report import Report
from sampler.config.options import Task

if TYPE_CHECKING:
    from sampler.engine import Engine

# option -> key of `sampler.config.schema.Config`
KEYS = {
    "-n": "run.n",
    "--seed": "run.seed",
    "--steps": "run.steps",
    "--batch-size": "run.batch_size",
    "--out": "output.dir",
}


@takes_model_options()
def command(
    context: typer.Context,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image file, or folder of images.")],
    task: Annotated[Task, typer.Option(help="Kind of damage to undo.")],
    method: Annotated[
        str | None,
        strategy_option(
            help="daps, data, admm, reddiff or difface; default: daps with --noise, else reddiff."
        ),
    ] = None,
    noise: Annotated[
        float | None,
        strategy_option(help="Standard deviation of the image's noise, in units of [-1, 1]."),
    ] = None,
    mask: Annotated[
        str | None,
        image_option(metavar="FILE", help="Mask for inpaint; white pixels are filled in."),
    ] = None,
    prompt: Annotated[str, image_option(help="Prompt that describes the image.")] = "",
    n: Annotated[int, image_option("-n", min=1, help="Restorations per image.")] = 8,
    seed: Annotated[int, image_option(help="Seed of the first restoration.")] = 0,
    steps: Annotated[int, strategy_option(help="Sampling steps, 1 to 1000.")] = 50,
    guidance: Annotated[
        str | None,
        strategy_option(
            help="Guidance rule of the prompt.", autocompletion=complete_names("guidance")
        ),
    ] = None,
    restorer: Annotated[
        str | None,
        strategy_option(
            help="Restorer for difface: pseudo_inverse, bicubic, or a restored image file."
        ),
    ] = None,
    strength: Annotated[
        float | None, strategy_option(help="Fraction of the steps for difface, above 0 up to 1.")
    ] = None,
    batch_size: Annotated[int | None, image_option(help="Images per batch.")] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="Run folder or its URL.")] = None,
    *,
    model: ModelOptions,
    download: Download = False,
    config: ConfigFiles = None,
    sets: Assignments = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Restore images: several versions of each, their mean, and a map of where they differ."""
    report = Report(as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with report.errors():
        from sampler.cli import batch
        from sampler.cli.source_options import settings_from_layers
        from sampler.config import tasks
        from sampler.runs import restored
        from sampler.runs.source import Source

        files = restored.image_files(image)
        operators = [tasks.operator_of(task, str(file), mask) for file in files]
        lines = restored.lines(
            files, operators[0], prompt, method, noise, guidance, restorer, strength
        )
        options = {**assigned(context, KEYS), **model_settings(model)}
        settings = settings_from_layers(None, config or [], sets or [], options, {})
        source = Source(settings, lines=lines, marks={restored.RESTORED: True})

        def loaded(engine: Engine) -> None:
            _print_contraction(engine, lines[0].cells, steps, report)

        where = batch.generate(source, batch.RunOptions(download=download), report, loaded)
        if where is not None:
            draw_summaries(where, report)


def draw_summaries(where: str, report: Report) -> None:
    """Write the mean and the spread of each image of a run of restorations, and print the files."""
    from sampler.cli.open_run import open_run
    from sampler.runs import restored

    run = open_run(where)
    for name, data in restored.summaries(run):
        run.store.put(name, data)
        report.event("restored", file=f"{where}/{name}")
        report.result(f"{where}/{name}")


def _print_contraction(engine: Engine, cells: Any, steps: int, report: Report) -> None:
    """Print the fraction of the restorer's error that remains after `difface`."""
    if cells["sampler"]["name"] != "difface":
        return
    from sampler import registry
    from sampler.samplers.difface import contraction

    size = (cells["height"], cells["width"])
    levels = registry.build("sampler", cells["sampler"]).levels(engine.pipeline.grid(steps, size))
    left = contraction(levels)
    report.event("contraction", value=left)
    report.note(f"difface: {left:.3g} (alpha²/sigma²) of the restorer's squared error remains.")
