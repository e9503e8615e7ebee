"""Build a Config from the form, as the command line would."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sampler.config import layers
from sampler.config.model import ModelConfig
from sampler.config.schema import Config
from sampler.core.errors import UsageError
from sampler.evaluation.best_of import BestOf
from sampler.ui import fields
from sampler.ui.export import as_number

MAX_IMAGES = 64  # per side; larger batches belong on the command line


@dataclass(frozen=True)
class PageInput:
    """Input shared by both sides of the page, as typed; an empty number is None.

    prompted: False for a pipeline without prompts, which are then left out; inputs: arguments of
    the stock pipeline's call, such as the image to start from.
    """

    prompts: str
    negative: str = ""
    seed: Any = None
    n: Any = 1
    steps: Any = 20
    width: Any = None
    height: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    prompted: bool = True


@dataclass(frozen=True)
class StrategyChoice:
    """Name of a strategy and the values of its controls."""

    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Choosing:
    """Fields of best of N, as typed: candidates per prompt (none: off), reward, draft steps."""

    count: Any = None
    reward: str = ""
    steps: Any = None

    def best(self) -> BestOf | None:
        """Return the request, None without candidates. Raises UsageError and ValueError."""
        count, draft = as_number(self.count), as_number(self.steps)
        if count is None:
            return None
        count = as_count(count, "Candidates")
        if not self.reward.strip():
            raise UsageError("Best of N needs a reward, which chooses among the drafts.")
        steps = {} if draft is None else {"steps": as_count(draft, "Draft steps")}
        return BestOf(count, self.reward.strip(), steps)


def as_count(value: Any, what: str) -> int:
    """A whole number of at least 1. Raises UsageError."""
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{what} = {value} must be a whole number of at least 1.")
    return value


def new_seed() -> int:
    """A random seed, short enough to type."""
    return secrets.randbelow(10**6)


def config_of(
    form: PageInput,
    choices: Mapping[str, StrategyChoice],
    model: ModelConfig,
    grid: str | None = "",
) -> Config:
    """Configuration of one side; choices: {kind: choice}; grid: that of `--grid`, "" for none.

    Raises UsageError and ValueError with the messages of the command line.
    """
    # The same prompt at the same seed is the same image.
    prompts = list(dict.fromkeys(line for t in form.prompts.splitlines() if (line := t.strip())))
    if not form.prompted:
        prompts = [""]
    if not prompts:
        raise UsageError("No prompts: write one per line.")
    options = {
        "prompts": ("prompts.texts", prompts),
        "--negative": ("run.negative_prompt", form.negative.strip() or None),
        "--seed": ("run.seed", as_number(form.seed)),
        "-n": ("run.n", as_number(form.n)),
        "--steps": ("run.steps", as_number(form.steps)),
        "--width": ("run.width", as_number(form.width)),
        "--height": ("run.height", as_number(form.height)),
    }
    options |= {f"--input {name}": (f"inputs.{name}", v) for name, v in form.inputs.items()}
    for kind, one in choices.items():
        options[f"--{kind}"] = (kind, fields.spec(kind, one.name, one.values))
    if text := (grid or "").strip():
        options["--grid"] = ("model.grid", text)
    elif isinstance(model.grid, str):  # it was in the control, and was cleared
        model = replace(model, grid=None)
    below = layers.Layer({"model": asdict(model)}, {})
    config = layers.resolve([below], [], layers.from_options(options))
    if (count := len(prompts) * config.run.n) > MAX_IMAGES:
        raise UsageError(
            f"{count} images exceed the limit of {MAX_IMAGES}; use `sampler generate` for more."
        )
    return config
