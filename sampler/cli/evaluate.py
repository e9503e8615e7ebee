"""`sampler eval`: scores of images with intervals, alone or against another setting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sampler.cli import generate
from sampler.cli.options import Debug, Json, Quiet, assigned, takes_options_of
from sampler.cli.progress import PLAIN_SECONDS
from sampler.cli.report import Report
from sampler.cli.source_options import source_of

if TYPE_CHECKING:
    from sampler.evaluation.table import Evaluation

# Parameters of `generate` that an evaluation has no use for.
_LEFT_OUT = (
    "prompts", "axis", "n", "dedupe", "new", "extend", "name_template", "expand", "wildcards",
    "best_of", "reward", "draft", "executor", "address", "dry_run", "task", "image", "mask",
    "init_image", "strength",
)  # fmt: skip
_SOURCE = (
    "prompts_file", "inputs", "control_image", "control_scale", "ip_image", "download", "offline",
    "fingerprint", "config", "preset", "sets", "scale",
)  # fmt: skip


@takes_options_of(generate.command, leave_out=_LEFT_OUT)
def command(
    context: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Run folder, its URL, or any folder of images."),
    ] = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option(
            "--scorers",
            metavar="NAME[:OPTION=VALUE],...",
            help="Rewards, judge, vqa, frechet, fd_inf, kernel, ...; repeatable.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Second set of images, compared pair by pair."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Images per prompt of --prompts.")] = 4,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Base seed of all images; default: 0.")
    ] = None,
    allow_python: Annotated[
        bool, typer.Option("--allow-python", help="Allow scorers given as module:function.")
    ] = False,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Folder for the images and results.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    *,
    options: dict[str, Any],
) -> None:
    """Score images, with 95 % intervals by bootstrap over prompts.

    The images are those of RUN, or are generated from --prompts FILE into the run folder -o, with
    the options of `sampler generate`: the seeds of a prompt depend on its text alone. Writes
    eval.md, eval.json and eval.csv.
    """
    report = Report(as_json=as_json, quiet=quiet, debug=debug, verbose=bool(options["verbose"]))
    with report.errors():
        from sampler.config.options import GENERATE
        from sampler.core.errors import UsageError
        from sampler.evaluation.api import evaluate
        from sampler.evaluation.parse import scorers_from
        from sampler.evaluation.pictures import open_pictures

        scorers_from(scorers or (), allow_python)
        given = _given(context, options)
        if run is None:
            if options["prompts_file"] is None or out is None:
                raise UsageError("Give a RUN to score, or --prompts FILE and -o RUN to generate.")
            for scorer in scorers_from(scorers or (), allow_python):  # before an image is generated
                scorer.check()
            if against is not None:
                open_pictures(against)
            _generate(assigned(context, GENERATE), options, repeats, out, report)
            run = out
        elif given:
            raise UsageError(f"{given[0]} has no effect on images that exist.")
        found = evaluate(
            run, scorers or (), against=against, out=out, allow_python=allow_python,
            progress=_counting(report),
        )  # fmt: skip
        _print(found, run, report)


def _given(context: typer.Context, options: dict[str, Any]) -> list[str]:
    """Options on the command line that are about images to generate."""
    own = {"repeats", "seed", *options} - {"verbose", "color"}
    by_name = {str(p.name): p.opts[-1] for p in context.command.params if p.name in own}
    sources = {name: context.get_parameter_source(name) for name in by_name}
    return [
        by_name[name]
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


def _generate(
    keys: dict[str, tuple[str, Any]],
    options: dict[str, Any],
    repeats: int,
    out: str,
    report: Report,
) -> None:
    """Generate or resume the run of an evaluation."""
    from sampler.cli import batch
    from sampler.core.errors import UsageError
    from sampler.evaluation.lines import evaluation_lines

    chosen: dict[str, Any] = {name: options[name] for name in _SOURCE}
    model = {k.removeprefix("model_"): v for k, v in options.items() if k.startswith("model_")}
    chosen["model"] = {name: value for name, value in model.items() if value is not None}
    source = source_of(keys, None, axis=None, **chosen)
    seed = source.config.run.seed
    if seed == "random":
        raise UsageError("run.seed: an evaluation is repeatable: give a number, or leave it out.")
    if source.config.run.n != 1 or source.config.prompts.expand != "none":
        raise UsageError("run.n and prompts.expand do not fit an evaluation; use --repeats.")
    lines = evaluation_lines(source.read_lines(), repeats, seed or 0)
    source = replace(source, lines=lines)
    run = batch.RunOptions(download=options["download"])
    batch.generate(source, run, replace(report, results=False))


def _counting(report: Report) -> Callable[[int, int], None]:
    """Print how many images a scorer has scored, every ten seconds."""
    shown = time.monotonic()

    def count(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= PLAIN_SECONDS:
            shown = time.monotonic()
            report.note(f"{done} of {total} images scored")
            report.event("progress", done=done, total=total)

    return count


def _print(found: Evaluation, run: str, report: Report) -> None:
    for row in found.rows:
        report.event("score", **row.plain())
    for note in found.notes:
        report.event("warning", message=note)
    report.event("summary", run=run, rows=len(found.rows))
    report.result(found.markdown().rstrip("\n"))
