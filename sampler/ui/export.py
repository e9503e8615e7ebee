"""Settings as text that says the same: a command line, a configuration file, a Python program."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from sampler.config.schema import STRATEGIES, Config, ModelConfig, RunConfig

_BARE = re.compile(r"[A-Za-z_][\w./-]*$")
_OPTIONS = {
    "negative_prompt": "--negative",
    "seed": "--seed",
    "n": "-n",
    "steps": "--steps",
    "width": "--width",
    "height": "--height",
}


def plain_number(value: Any) -> Any:
    """A whole number as an int: browsers know one kind of number only."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def word(value: Any) -> str:
    """A value as YAML on one line: a plain word where that is the same text, JSON elsewhere."""
    if isinstance(value, str) and _BARE.match(value) and value not in ("true", "false", "null"):
        return value
    return json.dumps(plain_number(value), ensure_ascii=False)


def shell(config: Config) -> str:
    """The `sampler generate` line of a configuration, for a POSIX shell."""
    parts = ["sampler", "generate"]
    texts = config.prompts.texts or ()
    dashes = any(text.startswith("-") for text in texts)  # such prompts stand behind `--`
    parts += () if dashes else texts
    for name, value in _own(config.model, ModelConfig()).items():
        direct = {"path": "--model", "revision": "--revision", "device": "--device"}
        parts += [direct.get(name, f"--{name}"), str(value)]
    for name, value in _run(config).items():
        parts += [_OPTIONS[name], str(value)]
    for kind in STRATEGIES:
        given = getattr(config, kind)
        parts += [f"--{kind}", given["name"]]
        for field, value in given.items():
            if field != "name":
                parts += ["--set", f"{kind}.{field}={word(value)}"]
    parts += ["--", *texts] if dashes else ()
    return shlex.join(parts)


def yaml(config: Config) -> str:
    """The configuration file of it, for `sampler generate -c`."""
    lines = ["version: 1", "prompts:"]
    lines += [f"  - {json.dumps(text, ensure_ascii=False)}" for text in config.prompts.texts or ()]
    sections = {"model": _own(config.model, ModelConfig()), "run": _run(config)}
    sections |= {kind: getattr(config, kind) for kind in STRATEGIES}
    for section, values in sections.items():
        if values:
            lines.append(f"{section}:")
            lines += [f"  {key}: {word(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def python(config: Config, seeds: Sequence[int], batch_size: int) -> str:
    """The program that makes the images of it; batch_size: of the run, since networks round
    differently with other batches."""
    run, texts = config.run, list(config.prompts.texts or ())
    own = _own(config.model, ModelConfig())
    load = [repr(own.pop("path"))] if "path" in own else []
    load += [f"{name}={value!r}" for name, value in own.items()]
    whole: dict[str, Any] = {
        "negative": run.negative_prompt,
        "seeds": list(seeds) if len(texts) > 1 else seeds[0],
        "n": run.n if run.n > 1 else None,
        "steps": run.steps,
        "width": run.width,
        "height": run.height,
        **{kind: getattr(config, kind) for kind in STRATEGIES},
        "batch_size": batch_size,
    }
    lines = ["import sampler", "", f"engine = sampler.load({', '.join(load)})"]
    lines += ["result = engine.generate("]
    lines += ["    [", *(f"        {text!r}," for text in texts), "    ],"]
    lines += [f"    {name}={value!r}," for name, value in whole.items() if value is not None]
    lines += [")", "for number, image in enumerate(result.images):"]
    lines += ['    image.save(f"{number:03d}.png")']
    return "\n".join(lines) + "\n"


def _run(config: Config) -> dict[str, Any]:
    """What is told of the section `run`: the steps and the seed always, others if they were set."""
    own = {"steps": config.run.steps, "seed": config.run.seed, **_own(config.run, RunConfig())}
    return {name: own[name] for name in _OPTIONS if own.get(name) is not None}


def _own(section: Any, default: Any) -> dict[str, Any]:
    """The fields of a section that are not at their defaults."""
    before = asdict(default)
    changed = {f.name: getattr(section, f.name) for f in fields(section)}
    return {name: value for name, value in changed.items() if value != before[name]}
