"""Export a configuration as a command line, a YAML file or a Python program."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from sampler import registry
from sampler.config.model import changed, flag_of, load_arguments
from sampler.config.options import GENERATE
from sampler.config.schema import STRATEGIES, Config, RunConfig
from sampler.evaluation.best_of import BestOf

_BARE = re.compile(r"[A-Za-z_][\w./-]*$")
_OPTION = {key: option for option, key in GENERATE.items()}
_RUN = ("negative_prompt", "seed", "n", "steps", "width", "height")  # fields of a form


def as_int(value: Any) -> Any:
    """An integral float as an int: browsers have one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_number(value: Any) -> Any:
    """The number that a text box holds, None for an empty one; other text stays, to be refused."""
    if not isinstance(value, str):
        return as_int(value)
    for number in (int, float):
        try:
            return as_int(number(value))
        except ValueError:
            continue
    return value.strip() or None


def yaml_scalar(value: Any) -> str:
    """A value as one line of YAML: plain text where YAML reads the same text, else JSON."""
    if isinstance(value, str) and _BARE.match(value) and value not in ("true", "false", "null"):
        return value
    return json.dumps(as_int(value), ensure_ascii=False)


def short(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A spec without the fields that are at their defaults."""
    about = registry.describe(kind, given["name"])["fields"]
    defaults = {f["name"]: f["default"] for f in about}
    return {k: v for k, v in given.items() if k == "name" or v != defaults[k]}


def shell(config: Config, best: BestOf | None = None) -> str:
    """`sampler generate` command of a configuration, for a POSIX shell."""
    parts = ["sampler", "generate"]
    texts = config.prompts.texts or ()
    dashes = any(text.startswith("-") for text in texts)  # such prompts go after `--`
    parts += () if dashes else texts
    for name, value in changed(config.model).items():
        if not isinstance(value, (str, bool, float, tuple)):  # a grid of numbers or with settings
            parts += ["--set", f"model.{name}={yaml_scalar(value)}"]
            continue
        for one in value if isinstance(value, tuple) else (value,):
            parts += [flag_of(name)] if one is True else [flag_of(name), str(one)]
    for name, value in _run(config).items():
        parts += [_OPTION[f"run.{name}"], str(value)]
    for name, value in config.inputs.items():
        parts += ["--input", f"{name}={value}"]
    for kind in STRATEGIES:
        spec = getattr(config, kind)
        parts += [f"--{kind}", spec["name"]]
        for field, value in spec.items():
            if field != "name":
                parts += ["--set", f"{kind}.{field}={yaml_scalar(value)}"]
    parts += _best_options(best)
    parts += ["--", *texts] if dashes else ()
    return shlex.join(parts)


def yaml(config: Config, best: BestOf | None = None) -> str:
    """YAML file of a configuration, for `sampler generate -c`; best: options beside the file."""
    more = shlex.join(_best_options(best))
    lines = [f"# sampler generate -c FILE {more}"] if more else []
    lines += ["version: 1", "prompts:"]
    lines += [f"  - {json.dumps(text, ensure_ascii=False)}" for text in config.prompts.texts or ()]
    sections = {"model": changed(config.model), "run": _run(config)}
    sections |= {"inputs": config.inputs}
    sections |= {kind: getattr(config, kind) for kind in STRATEGIES}
    for section, values in sections.items():
        if values:
            lines.append(f"{section}:")
            lines += [f"  {key}: {yaml_scalar(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _best_options(best: BestOf | None) -> list[str]:
    """Options of `sampler generate` for the best of several; they need a folder."""
    if best is None:
        return []
    drafts = [word for k, v in best.drafts.items() for word in ("--draft", f"{k}={v}")]
    return ["--best-of", str(best.count), "--reward", best.text, *drafts, "-o", "runs/best"]


def python(
    config: Config, seeds: Sequence[int], batch_size: int, best: BestOf | None = None
) -> str:
    """Python program that generates the images of a configuration.

    seeds: of all images, or of all candidates; batch_size: that of the run, since networks round
    differently with other batches.
    """
    run, texts = config.run, list(config.prompts.texts or ())
    load = [] if config.model.path is None else [repr(config.model.path)]
    load += [f"{name}={value!r}" for name, value in load_arguments(config.model).items()]
    arguments: dict[str, Any] = {
        "negative": run.negative_prompt,
        "seeds": list(seeds) if len(texts) > 1 else seeds[0],
        "n": run.n if run.n > 1 else None,
        "steps": run.steps,
        "width": run.width,
        "height": run.height,
        "grid": config.model.grid,
        **{kind: getattr(config, kind) for kind in STRATEGIES},
        "inputs": config.inputs or None,
        "batch_size": batch_size,
        "best_of": best and best.count,
        "reward": best and _reward(best),
        "drafts": best and (dict(best.drafts) or None),
    }
    lines = ["import sampler", "", f"engine = sampler.load({', '.join(load)})"]
    lines += ["result = engine.generate("]
    lines += ["    [", *(f"        {text!r}," for text in texts), "    ],"]
    lines += [f"    {name}={value!r}," for name, value in arguments.items() if value is not None]
    lines += [")", "for number, image in enumerate(result.images):"]
    lines += ['    image.save(f"{number:03d}.png")']
    return "\n".join(lines) + "\n"


def _reward(best: BestOf) -> Any:
    """The reward as `Engine.generate` takes it: its name, or a mapping with what was set."""
    spec = short("reward", registry.spec_of(best.reward))
    return spec["name"] if len(spec) == 1 else spec


def _run(config: Config) -> dict[str, Any]:
    """Exported fields of the section `run`: steps and seed always, others if they were set."""
    found = {
        "steps": config.run.steps,
        "seed": config.run.seed,
        **_changed(config.run, RunConfig()),
    }
    return {name: found[name] for name in _RUN if found.get(name) is not None}


def _changed(section: Any, default: Any) -> dict[str, Any]:
    """Fields of a section that differ from their defaults."""
    before = asdict(default)
    changed = {f.name: getattr(section, f.name) for f in fields(section)}
    return {name: value for name, value in changed.items() if value != before[name]}
