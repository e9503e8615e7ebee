"""All commands on one parser."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from sampler import __version__
from sampler.cli import (
    bench,
    calibrate,
    doctor,
    evaluate,
    finetune,
    generate,
    inspect,
    inspect_sets,
    list,
    replay,
    restore,
    resume,
    sheets,
    show,
    ui,
    validate,
    verify,
    vote,
)
from sampler.cli.report import Report

app = typer.Typer(
    help="Generate images with diffusion models: samplers, guidance rules and resumable batches.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    """Print the version and exit."""
    if asked:
        Report().result(f"diffusion-sampler {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


app.command("generate")(generate.command)
app.command("sweep", help=generate.SWEEP)(generate.command)
app.command("restore")(restore.command)
app.command("finetune")(finetune.command)
app.command("vote")(vote.command)
app.command("eval")(evaluate.command)
app.command("resume")(resume.command)
app.command("verify")(verify.command)
app.command("replay")(replay.command)
app.command("show")(show.command)
app.command("grid")(sheets.grid)
app.command("gallery")(sheets.gallery)
app.command("export")(sheets.export)
app.command("validate")(validate.validate)
app.command("list")(list.command)
app.command("doctor")(doctor.command)
app.command("ui")(ui.command)
app.add_typer(bench.app, name="bench")
app.add_typer(calibrate.app, name="calibrate")
_inspect = typer.Typer(help="Look inside a model.", no_args_is_help=True)
_inspect.command("features")(inspect.features)
_inspect.command("attention")(inspect.attention)
_inspect.command("basis")(inspect.basis)
_inspect.command("memory")(inspect_sets.memory)
_inspect.command("realism")(inspect_sets.realism)
_inspect.command("loss")(inspect_sets.loss)
app.add_typer(_inspect, name="inspect")
_config = typer.Typer(help="Configuration files.", no_args_is_help=True)
_config.command("schema")(validate.schema)
_config.callback()(lambda: None)
app.add_typer(_config, name="config")

# Click's UsageError: newer versions of typer have it in a private copy of click.
_ParserError: Any = typer.BadParameter.__base__
_NOT_ONE_OF = re.compile(r"(?:Value error, )?('([^']*)' is not one of ('.*'))\.$")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code."""
    try:
        code = app(
            args=None if arguments is None else [*arguments],
            prog_name="sampler",
            standalone_mode=False,
        )
    except typer.Abort:  # click's name for an interrupt outside of a command
        _report(arguments).failure("Interrupted.", 130)
        code = 130
    except _ParserError as error:
        text = " ".join(error.format_message().split())
        if text:  # a group without a command has printed its help
            _report(arguments).failure(_with_suggestion(text), 2)
        code = 2
    return code if isinstance(code, int) else 0


def _report(arguments: Sequence[str] | None) -> Report:
    """Output of a command line that has not been parsed."""
    return Report(as_json="--json" in (sys.argv[1:] if arguments is None else arguments))


def _with_suggestion(text: str) -> str:
    """A parser's message, with the nearest choice for a misspelt one."""
    from sampler import registry

    found = _NOT_ONE_OF.search(text)
    if found is None:
        return text
    hint = registry.suggestion(found[2], re.findall(r"'([^']*)'", found[3]))
    return f"{text[: found.start()]}{found[1]}{hint if hint.startswith(' (') else ''}."
