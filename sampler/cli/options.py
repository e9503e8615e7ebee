"""Options that several commands share."""

from __future__ import annotations

import os
from typing import Annotated

import typer


def _colour(when: str) -> str:
    """`never` is told to everything that draws by the variable that all of it knows."""
    if when not in ("auto", "never"):
        raise typer.BadParameter(f"{when!r:.20} is neither auto nor never.")
    if when == "never":
        os.environ["NO_COLOR"] = "1"
    return when


Json = Annotated[bool, typer.Option("--json", help="Events as JSON Lines on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no notes.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Tell the resolved settings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Color = Annotated[str, typer.Option("--color", callback=_colour, help="auto or never.")]
