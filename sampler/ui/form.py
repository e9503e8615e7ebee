"""From what a form holds to the configuration that the command line would make of it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sampler.config import layers
from sampler.config.schema import Config, ModelConfig
from sampler.errors import UsageError
from sampler.ui import fields
from sampler.ui.export import plain_number

MOST = 64  # images of one setting; more are a matter of a batch run


@dataclass(frozen=True)
class Form:
    """What both sides of the page share, as it was typed. Empty numbers are None."""

    prompts: str
    negative: str = ""
    seed: Any = None
    n: Any = 1
    steps: Any = 20
    width: Any = None
    height: Any = None


@dataclass(frozen=True)
class Chosen:
    """A strategy of one side: its name, and what its controls hold."""

    name: str
    values: Mapping[str, Any]


def new_seed() -> int:
    """A seed that was not chosen; small enough to be typed again."""
    return secrets.randbelow(10**6)


def config_of(form: Form, chosen: Mapping[str, Chosen], model: ModelConfig) -> Config:
    """The configuration of one side; chosen: by kind. The errors are those of the command line.

    Raises SamplerError (2), ValueError.
    """
    # Equal prompts at equal seeds are one image.
    prompts = list(dict.fromkeys(line for t in form.prompts.splitlines() if (line := t.strip())))
    if not prompts:
        raise UsageError("There is no prompt; write one on a line.")
    given = {
        "prompts": ("prompts.texts", prompts),
        "--negative": ("run.negative_prompt", form.negative.strip() or None),
        "--seed": ("run.seed", plain_number(form.seed)),
        "-n": ("run.n", plain_number(form.n)),
        "--steps": ("run.steps", plain_number(form.steps)),
        "--width": ("run.width", plain_number(form.width)),
        "--height": ("run.height", plain_number(form.height)),
    }
    for kind, one in chosen.items():
        given[f"--{kind}"] = (kind, fields.spec(kind, one.name, one.values))
    below = layers.Layer({"model": asdict(model)}, {})
    config = layers.resolve([below], [], layers.from_options(given))
    if (count := len(prompts) * config.run.n) > MOST:
        raise UsageError(
            f"{count} images are more than {MOST}; `sampler generate` makes as many as you like."
        )
    return config
