"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Events as JSON Lines on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no notes.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Tell the resolved settings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
