"""The command `sampler`: one module per command; nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from sampler.cli import (
    bench,
    calibrate,
    doctor,
    finetune,
    generate,
    listing,
    replay,
    resume,
    sheets,
    show,
    ui,
    validate,
    verify,
)

app = typer.Typer(
    help="Images from text with diffusion models: samplers and guidance rules as parts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.command)
app.command("sweep", help=generate.SWEEP)(generate.command)
app.command("finetune")(finetune.command)
app.command("resume")(resume.command)
app.command("verify")(verify.command)
app.command("replay")(replay.command)
app.command("show")(show.command)
app.command("grid")(sheets.grid)
app.command("gallery")(sheets.gallery)
app.command("export")(sheets.export)
app.command("validate")(validate.validate)
app.command("list")(listing.command)
app.command("bench")(bench.command)
app.command("doctor")(doctor.command)
app.command("ui")(ui.command)
app.add_typer(calibrate.app, name="calibrate")
_config = typer.Typer(help="The configuration files' schema.", no_args_is_help=True)
_config.command("schema")(validate.schema)
_config.callback()(lambda: None)
app.add_typer(_config, name="config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns its exit code."""
    try:
        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="sampler",
            standalone_mode=False,
        )
    except typer.Abort:
        code = 130
    except Exception as error:
        # typer's usage errors: they share no public base class over the supported versions
        if not hasattr(error, "format_message"):
            raise
        told = " ".join(error.format_message().split())  # pyright: ignore[reportAttributeAccessIssue]
        if told:  # a group without a command has shown its help
            print(f"sampler: {told}", file=sys.stderr)
        code = 2
    return code if isinstance(code, int) else 0
