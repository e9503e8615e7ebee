"""`sampler calibrate`: numbers that a method needs for one model, found by runs over prompts."""

from __future__ import annotations

import typer

from sampler.cli import calibrate_linear_ag, calibrate_momentum

app = typer.Typer(help="Find what a method needs for one model.", no_args_is_help=True)
app.command("momentum")(calibrate_momentum.command)
app.command("linear-ag")(calibrate_linear_ag.command)
