"""Scorers from names: `classifier`, `classifier:head=background`, `frechet:reference=FOLDER`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sampler import registry
from sampler.core.errors import UsageError
from sampler.evaluation.features import SetMeasure, distance, diversity
from sampler.evaluation.objects import ObjectScorer
from sampler.evaluation.questions import QuestionScorer
from sampler.evaluation.scorers import (
    STATISTICS,
    ImageScorer,
    JudgeScorer,
    RewardScorer,
    Statistic,
)
from sampler.rewards.python import reward_from
from sampler.runs.cells import scalar

Scorer = ImageScorer | SetMeasure

# Names of published protocols, and the parts of them that an evaluation here lacks.
PROTOCOLS: Mapping[str, str] = {
    "fid": "Inception-v3 features, their reference set and 10,000 to 50,000 images; "
    "frechet:features=FOLDER:reference=FOLDER is the same distance under its own name",
    "kid": "Inception-v3 features and their reference set; "
    "kernel:features=FOLDER:reference=FOLDER is the same distance under its own name",
    "inception_score": "Inception-v3 class probabilities of 50,000 images",
    "geneval": "its 553 prompts, Mask2Former, CLIP ViT-L/14 and 4 images per prompt; "
    "geneval:FILE:detector=DIR:clip=DIR has its rules, as geneval-like(DIR)",
    "dpg": "its 1,065 prompts, mPLUG-large and 4 images per prompt; "
    "dpg:FILE:model=DIR has its rules, as dpg-like(DIR)",
    "t2i_compbench": "its prompts, BLIP-VQA, UniDet and CLIP",
    "clip_score": "a fixed CLIP model and scale; clip names the model it is given",
}
_ALIASES = {"is": "inception_score", "t2icomp": "t2i_compbench"}  # of one word

DEFAULTS = (*STATISTICS, "diversity", "vendi")
_FEATURES: Mapping[str, Callable[..., SetMeasure]] = {
    "frechet": distance,
    "fd_inf": distance,
    "kernel": distance,
    "diversity": diversity,
    "vendi": diversity,
}
# Scorers with a file of questions or objects by prompt, which may stand without its option's name.
_FILES: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "vqa": ("questions", ("model",), ()),
    "dpg": ("questions", ("model",), ("released",)),
    "geneval": ("objects", ("detector",), ("clip", "threshold")),
}


def scorer_names() -> list[str]:
    """Names of all scorers: rewards, the judge, statistics, measures of sets, and questions."""
    return sorted({*registry.names("reward"), "judge", *STATISTICS, *_FEATURES, *_FILES})


def scorers_from(specs: Sequence[Any], allow_python: bool = False) -> list[Scorer]:
    """Build the scorers of a list of names, mappings, rewards or functions; commas separate names.

    Raises UsageError for unknown names and options, two scorers of one label, and names of
    published protocols, which are printed only for a run that follows the protocol.
    """
    texts = [
        part for spec in specs for part in (spec.split(",") if isinstance(spec, str) else [spec])
    ]
    found = [_built(one, allow_python) for one in texts if one != ""]
    labels = [scorer.label for scorer in found]
    for label in labels:  # also that of a function of one's own
        _refuse_protocol(label.partition("(")[0])
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(
            f"The scorer {twice[0]!r} is given twice, or two are called so: files and folders of "
            "different names, and functions of different names, have different labels."
        )
    return found


def with_standard_scorers(scorers: Sequence[Scorer]) -> list[Scorer]:
    """Add the measures of every evaluation: saturation, clipped values, sharpness, diversity."""
    labels = {scorer.label for scorer in scorers}
    return [*scorers, *(s for s in scorers_from(DEFAULTS) if s.label not in labels)]


def _built(spec: Any, allow_python: bool) -> Scorer:
    if not isinstance(spec, str):
        reward = reward_from(spec, allow_python)
        options = (
            {k: v for k, v in spec.items() if k != "name"} if isinstance(spec, Mapping) else {}
        )
        return RewardScorer(reward, _label(reward.name, options))
    name, *parts = spec.strip().split(":")
    if not (parts and name in _FILES):
        _refuse_protocol(name)
    if name not in scorer_names():
        if ":" in spec:
            return RewardScorer(reward_from(spec.strip(), allow_python), parts[-1])
        near = registry.suggestion(name, scorer_names())
        raise UsageError(f"There is no scorer {name!r:.60}{near}.")
    if name in _FILES and parts:
        parts[0] = parts[0] if "=" in parts[0] else f"{_FILES[name][0]}={parts[0]}"
    options = _options(name, parts)
    if name in _FILES:
        return _asking(name, options)
    if name in _FEATURES:
        if wrong := [key for key in options if key not in ("features", "reference")]:
            raise UsageError(f"{name} has no option {wrong[0]!r:.40}; features=, reference=.")
        given = {"source" if k == "features" else k: str(v) for k, v in options.items()}
        if name in ("diversity", "vendi") and "reference" in given:
            raise UsageError(f"{name} has no option 'reference': it needs none.")
        return _FEATURES[name](name, **given)
    if name == "judge" or name in STATISTICS:
        if options:
            raise UsageError(f"{name} has no options.")
        return JudgeScorer() if name == "judge" else Statistic(name, STATISTICS[name])
    try:
        return RewardScorer(reward_from({"name": name, **options}), _label(name, options))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _asking(name: str, options: Mapping[str, Any]) -> Scorer:
    """Build a scorer that has a file of its own."""
    file, needed, further = _FILES[name]
    known = (file, *needed, *further)
    if wrong := [key for key in options if key not in known]:
        raise UsageError(f"{name} has no option {wrong[0]!r:.40}; it has {', '.join(known)}.")
    if missing := [key for key in (file, *needed) if key not in options]:
        form = ":".join([name, "FILE", *(f"{key}=DIR" for key in needed)])
        raise UsageError(f"{name} needs {missing[0]}=PATH, as in {form}.")
    given: dict[str, Any] = {
        k: v if k in ("released", "threshold") else str(v) for k, v in options.items()
    }
    return ObjectScorer(**given) if name == "geneval" else QuestionScorer(name, **given)


def _refuse_protocol(name: str) -> None:
    plain = re.sub(r"[^a-z0-9]|\d+k?$", "", name.lower())  # of "FID-50k" too
    named = {key.replace("_", ""): key for key in PROTOCOLS} | _ALIASES
    key = named.get(plain, named.get(re.sub("(bench|score)$", "", plain), ""))
    if key:
        raise UsageError(
            f"{name!r} is the name of a protocol, which is {PROTOCOLS[key]}: without it a number "
            "of that name would not be comparable."
        )


def _options(name: str, parts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UsageError(f"{name}: {part!r:.60} must be OPTION=VALUE.")
        if key in found:
            raise UsageError(f"{name}: {key} is given twice.")
        found[key] = scalar(value)
    return found


def _label(name: str, options: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key}={PurePath(str(value)).name}" for key, value in options.items())
    return f"{name}({shown})" if shown else name
