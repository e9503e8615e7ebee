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

# Where each command is: a function, or a Typer with commands of its own.
COMMANDS = {
    "generate": "generate:command",
    "sweep": "generate:command",
    "restore": "restore:command",
    "finetune": "finetune:command",
    "vote": "vote:command",
    "eval": "evaluate:command",
    "resume": "resume:command",
    "verify": "verify:command",
    "replay": "replay:command",
    "show": "show:command",
    "grid": "sheets:grid",
    "gallery": "sheets:gallery",
    "export": "sheets:export",
    "validate": "validate:validate",
    "list": "list:command",
    "doctor": "doctor:command",
    "ui": "ui:command",
    "bench": "bench:app",
    "calibrate": "calibrate:app",
    "inspect": "inspect:app",
    "config": "validate:config",
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
    first word is a command, the parser has that one only, and the overview has none of them.
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
        module, attribute = COMMANDS[name].split(":")
        found = getattr(import_module(f"sampler.cli.{module}"), attribute)
        if first in ("-h", "--help"):
            app.command(name, help=_help(name, found))(_nothing)
        elif isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, help=_help(name, found))(found)
    return app


def _help(name: str, command: Any) -> str | None:
    if name == "sweep":
        from sampler.cli.generate import SWEEP

        return SWEEP
    return command.info.help if isinstance(command, typer.Typer) else inspect.getdoc(command)


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
