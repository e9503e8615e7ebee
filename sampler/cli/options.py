"""Options that several commands share, and the configuration keys that options set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sampler import registry
from sampler.config.options import Dtype

# Options by panel of `--help`.
prompts_option = partial(typer.Option, rich_help_panel="Prompts")
strategy_option = partial(typer.Option, rich_help_panel="Sampler and guidance")
image_option = partial(typer.Option, rich_help_panel="Images")
model_option = partial(typer.Option, rich_help_panel="Model")
configuration_option = partial(typer.Option, rich_help_panel="Configuration")
execution_option = partial(typer.Option, rich_help_panel="Execution")
message_option = partial(typer.Option, rich_help_panel="Messages")

_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu")


def _set_color(when: str) -> str:
    """Set NO_COLOR, which rich and every library that follows the convention read."""
    if when == "never":
        os.environ["NO_COLOR"] = "1"
    return when


def _check_device(name: str | None) -> str | None:
    """Refuse a misspelt device before torch is imported; loading checks that it is present."""
    if name is not None and name.partition(":")[0] not in _DEVICES:
        raise typer.BadParameter(f"{name!r:.40}{registry.suggestion(name, _DEVICES)}.")
    return name


def complete_names(*kinds: str) -> Callable[[str], list[str]]:
    """Shell completion with the registered names of some kinds."""

    def complete(incomplete: str) -> list[str]:
        names = [name for kind in kinds for name in registry.names(kind)]
        return [name for name in names if name.startswith(incomplete)]

    return complete


Run = Annotated[str, typer.Argument(help="Run folder or its URL.")]
Json = Annotated[bool, message_option("--json", help="Print JSON Lines events.")]
Quiet = Annotated[bool, message_option("-q", "--quiet", help="No progress, no notes.")]
Verbose = Annotated[
    bool, message_option("-v", "--verbose", help="Print the resolved configuration.")
]
Debug = Annotated[bool, message_option("--debug", help="Show tracebacks.")]
Color = Annotated[
    Literal["auto", "never"], message_option("--color", callback=_set_color, help="Color output.")
]
ModelPath = Annotated[
    str | None, model_option("--model", help="Model folder or Hub id; default: bundled.")
]
Revision = Annotated[str | None, model_option(help="Hub revision (commit or tag).")]
Device = Annotated[
    str | None,
    model_option(
        metavar="auto|cpu|cuda|cuda:N|mps",
        callback=_check_device,
        help="Device to run on; default: auto.",
    ),
]
Precision = Annotated[Dtype | None, model_option("--dtype", help="Data type of the networks.")]
Lora = Annotated[
    list[str] | None,
    model_option("--lora", metavar="DIR[:WEIGHT]", help="LoRA to load; repeatable."),
]
Download = Annotated[
    bool, model_option("--download", help="Download a model that is not in the local cache.")
]
ConfigFiles = Annotated[
    list[Path] | None,
    configuration_option(
        "-c", "--config", help="YAML, TOML or JSON file; repeatable, later files win."
    ),
]
Assignments = Annotated[
    list[str] | None,
    configuration_option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any configuration key, such as run.steps=20; repeatable.",
    ),
]
Executor = Annotated[
    Literal["local", "torchrun", "ray"], execution_option(help="Where batches are computed.")
]
Address = Annotated[str | None, execution_option(help="Ray cluster address; default: local.")]


def assigned(context: typer.Context, keys: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Values of the options of a command line that set a configuration key.

    keys: {option: key}. Returns {option: (key, value)}; value is None for an option not given.
    """
    names = {option: p.name for p in context.command.params for option in p.opts}
    return {option: (key, context.params[str(names[option])]) for option, key in keys.items()}
