"""The parser of the command line: one module per command, imported when it is named."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from sampler import __version__
from sampler.cli.report import Report

# Where each command is, a function or a Typer with commands of its own, and its line in the
# overview: the first paragraph of its help, which is there without importing its module.
COMMANDS = {
    "generate": (
        "generate:command",
        "Generate images from prompts; without --model, with the small bundled model.",
    ),
    "sweep": (
        "generate:command",
        "Generate images for every combination of the values of one or more --axis options.",
    ),
    "restore": (
        "restore:command",
        "Restore images: several versions of each, their mean, and a map of where they differ.",
    ),
    "finetune": (
        "finetune:command",
        "Fine-tune a model for a reward; the same command resumes a stopped run.",
    ),
    "vote": ("vote:command", "Vote on the images of a fine-tuning run with the reward `votes`."),
    "eval": ("evaluate:command", "Score images, with 95 % intervals by bootstrap over prompts."),
    "resume": ("resume:command", "Resume a run: generate the missing images with its stored plan."),
    "verify": (
        "verify:command",
        "Check every file of a run against its journal; exit code 3 if anything is wrong.",
    ),
    "replay": (
        "replay:command",
        "Regenerate an image; bit-identical from its run folder, which records its batch.",
    ),
    "show": ("show:command", "Show the records of a run, or the record inside an image."),
    "grid": (
        "sheets:grid",
        "Draw contact sheets of a run into its folder grids/, labelled with the axes of a sweep.",
    ),
    "gallery": (
        "sheets:gallery",
        "Write gallery.html into a run folder: thumbnails, filters and records, without scripts.",
    ),
    "export": (
        "sheets:export",
        "Export a run, complete or not, as a table or as shards of images with records.",
    ),
    "validate": (
        "validate:validate",
        "Check configuration and prompt files; exit code 2 if one is invalid.",
    ),
    "list": ("list:command", "List samplers, guidance rules, rewards, trainers or schedulers."),
    "doctor": ("doctor:command", "Show versions, devices, optional extras and free disk space."),
    "ui": ("ui:command", "Serve the playground for samplers and guidance rules (localhost only)."),
    "bench": (
        "bench:app",
        "Measure a model: the cost of runs (default) and the accuracy of samplers.",
    ),
    "calibrate": ("calibrate:app", "Fit per-model parameters (LinearAG, momentum number, grid)."),
    "inspect": ("inspect:app", "Inspect a model: features, attention, denoiser, training images."),
    "config": ("validate:config", "Configuration files."),
}


def _print_version(asked: bool) -> None:
    """Print the version and exit."""
    if asked:
        Report().result(f"diffusion-sampler {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


def parser(words: Sequence[str] | None = None) -> typer.Typer:
    """The parser for a command line; of all commands for None.

    Building the options of every command takes longer than many commands themselves: where the
    first word is a command, the parser has that one only, and the overview has none of them and
    imports no command.
    """
    app = typer.Typer(
        help="Generate images with diffusion models: samplers, guidance rules and resumable "
        "batches.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    first = None if words is None else next(iter(words), "--help")
    for name in [first] if first in COMMANDS else COMMANDS:
        place, summary = COMMANDS[name]
        if first in ("-h", "--help", "--version"):
            app.command(name, help=summary)(_nothing)
            continue
        module, attribute = place.split(":")
        found = getattr(import_module(f"sampler.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, help=_help(name, found))(found)
    return app


def _help(name: str, command: Any) -> str | None:
    if name == "sweep":
        from sampler.cli.generate import SWEEP

        return SWEEP
    return inspect.getdoc(command)


def _nothing() -> None:
    pass


# Click's UsageError: newer versions of typer have it in a private copy of click.
_ParserError: Any = typer.BadParameter.__base__
_NOT_ONE_OF = re.compile(r"(?:Value error, )?('([^']*)' is not one of ('.*'))\.$")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code."""
    words = sys.argv[1:] if arguments is None else [*arguments]
    completing = "_SAMPLER_COMPLETE" in os.environ  # the shell's words are not in the arguments
    try:
        code = parser(None if completing else words)(
            args=words, prog_name="sampler", standalone_mode=False
        )
    except typer.Abort:  # click's name for an interrupt outside of a command
        _report(words).failure("Interrupted.", 130)
        code = 130
    except _ParserError as error:
        text = " ".join(error.format_message().split())
        if text:  # a group without a command has printed its help
            _report(words).failure(_with_suggestion(text), 2)
        code = 2
    return code if isinstance(code, int) else 0


def _report(words: Sequence[str]) -> Report:
    """Output of a command line that has not been parsed."""
    return Report(as_json="--json" in words)


def _with_suggestion(text: str) -> str:
    """A parser's message, with the nearest choice for a misspelt one."""
    from sampler import registry

    found = _NOT_ONE_OF.search(text)
    if found is None:
        return text
    hint = registry.suggestion(found[2], re.findall(r"'([^']*)'", found[3]))
    return f"{text[: found.start()]}{found[1]}{hint if hint.startswith(' (') else ''}."
