"""Options that several commands share, and the configuration keys that options set."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from sampler.config.model import ModelConfig, flag_of

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
        from sampler import registry

        raise typer.BadParameter(f"{name!r:.40}{registry.suggestion(name, _DEVICES)}.")
    return name


def complete_names(*kinds: str) -> Callable[[str], list[str]]:
    """Shell completion with the registered names of some kinds."""

    def complete(incomplete: str) -> list[str]:
        from sampler import registry

        names = [name for kind in kinds for name in registry.names(kind)]
        return [name for name in names if name.startswith(incomplete)]

    return complete


def expanded(path: Path | None) -> Path | None:
    """The path with the user's folder for ~, which shells leave in --out=~/x."""
    return path and path.expanduser()


Run = Annotated[str, typer.Argument(help="Run folder or its URL.")]
Json = Annotated[bool, message_option("--json", help="Print JSON Lines events.")]
Quiet = Annotated[bool, message_option("-q", "--quiet", help="Print neither progress nor notes.")]
Verbose = Annotated[
    bool, message_option("-v", "--verbose", help="Print the resolved configuration.")
]
Debug = Annotated[bool, message_option("--debug", help="Show tracebacks.")]
Color = Annotated[
    Literal["auto", "never"], message_option("--color", callback=_set_color, help="Color output.")
]
Download = Annotated[
    bool, model_option("--download", help="Download a model that is not in the local cache.")
]
ConfigFiles = Annotated[
    list[Path] | None,
    configuration_option(
        "-c",
        "--config",
        callback=lambda paths: [path.expanduser() for path in paths or ()],
        help="YAML, TOML or JSON file; repeatable, later files win.",
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
    Literal["local", "torchrun", "ray"], execution_option(help="Executor that runs the batches.")
]
Address = Annotated[str | None, execution_option(help="Ray cluster address; default: local.")]


def assigned_inputs(
    texts: list[str], others: Mapping[str, tuple[str, Any]]
) -> dict[str, tuple[str, Any]]:
    """Values of `--input NAME=VALUE` options, as `assigned` returns them.

    others: options that set inputs too. Raises UsageError for another form and a name given twice.
    """
    from sampler.core.errors import UsageError
    from sampler.runs.cells import scalar

    found: dict[str, tuple[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UsageError(f"--input takes NAME=VALUE, not {text!r:.60}.")
        if f"--input {name}" in found:
            raise UsageError(f"--input {name} is given twice.")
        if twin := next((o for o, (key, _) in others.items() if key == f"inputs.{name}"), None):
            raise UsageError(f"--input {name} and {twin} are the same; give one of them.")
        found[f"--input {name}"] = (f"inputs.{name}", scalar(value))
    return found


def assigned(context: typer.Context, keys: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Values of the options of a command line that set a configuration key.

    keys: {option: key}; options that the command lacks are left out. Returns {option: (key,
    value)}; value is None for an option not given.
    """
    names = {option: str(p.name) for p in context.command.params for option in p.opts}
    return {
        option: (key, context.params[names[option]])
        for option, key in keys.items()
        if option in names
    }


# Values of the model options of a command line by field of ModelConfig; only those that are given.
ModelOptions = dict[str, Any]


def takes_model_options(
    leave_out: tuple[str, ...] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command that replaces its parameter `model: ModelOptions` by options.

    There is one per field of `sampler.config.model`, except those of `leave_out`.
    """
    names = [f.name for f in fields(ModelConfig) if f.name not in leave_out]
    options = {f"model_{name}": name for name in names}

    def decorator(command: Callable[..., None]) -> Callable[..., None]:
        def parameters() -> Iterator[inspect.Parameter]:
            for parameter in inspect.signature(command, eval_str=True).parameters.values():
                if parameter.name != "model":
                    yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                    continue
                for key, name in options.items():
                    yield _parameter(key, name)

        @wraps(command)
        def wrapper(**given: Any) -> None:
            values = {name: given.pop(key) for key, name in options.items()}
            command(**given, model={k: v for k, v in values.items() if v is not None})

        wrapper.__signature__ = inspect.Signature([*parameters()])  # pyright: ignore
        return wrapper

    return decorator


def takes_options_of(
    other: Callable[..., None], leave_out: tuple[str, ...]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command that replaces its parameter `options` by those of another command.

    options: dict by parameter name. Left out are those of `leave_out` and those that the command
    has itself.
    """

    def decorator(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        added = {
            name: parameter
            for name, parameter in inspect.signature(other, eval_str=True).parameters.items()
            if name not in (*leave_out, *own)
        }

        @wraps(command)
        def wrapper(**given: Any) -> None:
            options = {name: given.pop(name) for name in added}
            command(**given, options=options)

        keyword = inspect.Parameter.KEYWORD_ONLY
        every = [p.replace(kind=keyword) for n, p in own.items() if n != "options"]
        every += added.values()
        wrapper.__signature__ = inspect.Signature(every)  # pyright: ignore
        return wrapper

    return decorator


def model_settings(model: ModelOptions) -> dict[str, tuple[str, Any]]:
    """Model options as {option: (configuration key, value)}."""
    return {flag_of(name): (f"model.{name}", value) for name, value in model.items()}


_MODEL = get_type_hints(ModelConfig)


def _parameter(key: str, name: str) -> inspect.Parameter:
    """Command-line option of a field of ModelConfig; None where it is not given."""
    entry = next(f for f in fields(ModelConfig) if f.name == name)
    flag, kind = flag_of(name), _MODEL[name]
    option = model_option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=entry.metadata["help"],
        metavar=entry.metadata["metavar"],
        callback=_check_device if name == "device" else None,
    )
    if kind == tuple[str, ...]:
        kind = list[str]
    elif name == "grid":
        kind = str
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
