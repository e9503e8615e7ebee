"""Jobs: one image each, with the record that determines it, a key and a seed.

    key  = first 20 hex digits of SHA-256(canonical JSON of the record)
    seed = given, or derived: first 63 bits of SHA-256(run seed, record without seed, replica)

The record holds everything that changes the image and nothing else: no paths, tags or times.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sampler import registry
from sampler.types import MAX_SEED

RECORD_FORMAT = 1

_PLAIN: dict[str, Any] = {
    "separators": (",", ":"),
    "ensure_ascii": False,
    "allow_nan": False,
    "check_circular": False,
}
_encode = json.JSONEncoder(**_PLAIN).encode
_encode_sorted = json.JSONEncoder(sort_keys=True, **_PLAIN).encode


@dataclass(frozen=True)
class Model:
    """Identity of a run's model.

    fingerprint: hash of weights and configurations; label: name in image metadata; native: default
    (height, width), None if the files do not state it; path: argument of `sampler.load`, None for a
    pipeline in memory. options: what else of the model's options decides the pixels, hashes instead
    of paths: variant, vae, lora [[hash, weight]], student, weak, attention, vae_tiling, compile;
    and levels, where they are not those of the model's files.
    """

    fingerprint: str
    dtype: str = "float32"
    label: str = ""
    native: tuple[int, int] | None = None
    path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def identity(self) -> dict[str, Any]:
        """The part of a record that decides the pixels."""
        return {**self.options, "fingerprint": self.fingerprint, "dtype": self.dtype}


def model_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the options in which two identities differ; "model" for the model's own files."""
    names = {**before, **after}
    found = sorted(name for name in names if before.get(name) != after.get(name))
    return ["model" if name == "fingerprint" else f"model.{name}" for name in found]


@dataclass(frozen=True)
class JobSettings:
    """Settings that the jobs of a batch share; `sampler` and `guidance` are complete specs.

    inputs: planned arguments of a stock pipeline's call by name (`sampler.core.inputs`). grid:
    levels instead of the model's own, see `Schedule.grid`.
    """

    steps: int
    height: int | None
    width: int | None
    sampler: Mapping[str, Any]
    guidance: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    grid: Any = None

    def plain(self) -> dict[str, Any]:
        """Return plain data for `plan.json`, without inputs and grid where there are none."""
        left_out = {"inputs": not self.inputs, "grid": self.grid is None}
        return {k: v for k, v in asdict(self).items() if not left_out.get(k)}


@dataclass(frozen=True)
class Job:
    """One image of a run: its number, and the prompt line and settings group that it belongs to.

    replica: number of a copy of an equal job (`--no-dedupe`). tag, meta and axes are labels without
    effect on the image.
    """

    index: int
    key: str
    line: int
    group: int
    prompt: str
    negative_prompt: str
    seed: int
    replica: int = 0
    tag: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    axes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def encode(self) -> bytes:
        """Encode as a line of jobs.jsonl; the key comes first, at a fixed position."""
        body: dict[str, Any] = {
            "key": self.key,
            "index": self.index,
            "line": self.line,
            "group": self.group,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
        }
        for name in ("replica", "tag", "meta", "axes"):
            if value := getattr(self, name):
                body[name] = value
        return (_encode(body) + "\n").encode()

    @staticmethod
    def parse(line: str | bytes) -> Job:
        """Decode a line of jobs.jsonl. Raises ValueError or TypeError."""
        return Job(**json.loads(line))


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no whitespace, NFC text, floats by repr.

    Raises ValueError for NaN and infinity, TypeError for values that JSON cannot hold.
    """
    text = _encode_sorted(value)
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def key_of(record: Any) -> str:
    """First 20 hex digits of the SHA-256 of a record's canonical JSON."""
    return _digest(record).hexdigest()[:20]


def record_of(job: Job, settings: JobSettings, model: Model) -> dict[str, Any]:
    """Record of a job: all that determines its image, as plain data."""
    return {**shared_record(settings, model), **_own(job.prompt, job.negative_prompt, job.replica),
            "seed": job.seed}  # fmt: skip


def shared_record(settings: JobSettings, model: Model) -> dict[str, Any]:
    """Part of the record that all jobs of a group share."""
    return {
        "v": RECORD_FORMAT,
        "model": model.identity,
        "steps": settings.steps,
        "height": settings.height,
        "width": settings.width,
        "sampler": settings.sampler,
        "guidance": settings.guidance,
        **({"inputs": _recorded(settings.inputs)} if settings.inputs else {}),
        **({} if settings.grid is None else {"grid": settings.grid}),
        "strategies": {
            **_versions("sampler", settings.sampler),
            **_versions("guidance", settings.guidance),
        },
    }


def _recorded(inputs: Any) -> Any:
    """Inputs as they decide an image: files by their content, wherever they lie."""
    if isinstance(inputs, Mapping):
        kept = {k: v for k, v in inputs.items() if "sha256" not in inputs or k == "sha256"}
        return {name: _recorded(value) for name, value in kept.items()}
    if isinstance(inputs, (list, tuple)):
        return [_recorded(value) for value in inputs]
    return inputs


class Keys:
    """Keys and seeds of the jobs of one group; the shared part is encoded once, not per job."""

    def __init__(self, settings: JobSettings, model: Model) -> None:
        shared = shared_record(settings, model)
        names = sorted([*shared, *_OWN])
        parts = {name: _member(name, shared[name]) for name in shared}
        self._layout = [(name, parts.get(name, "")) for name in names]

    def key(self, prompt: str, negative: str, replica: int, seed: int) -> str:
        """`key_of(record_of(...))`, several times faster."""
        return self._hash(prompt, negative, replica, seed).hexdigest()[:20]

    def seed(self, prompt: str, negative: str, replica: int, run_seed: int) -> int:
        """Derived seed of an image; `replica` is its number within the line."""
        digest = self._hash(prompt, negative, 0, None)
        digest.update(f"\n{run_seed}\n{replica}".encode())
        return int.from_bytes(digest.digest()[:8], "big") & MAX_SEED

    def _hash(self, prompt: str, negative: str, replica: int, seed: int | None) -> Any:
        own: dict[str, Any] = _own(prompt, negative, replica)
        if seed is not None:
            own["seed"] = seed
        members = [
            part or _member(name, own[name]) for name, part in self._layout if part or name in own
        ]
        return hashlib.sha256(("{" + ",".join(members) + "}").encode())


_OWN = ("prompt", "negative_prompt", "replica", "seed")


def _own(prompt: str, negative: str, replica: int) -> dict[str, Any]:
    own: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    return {**own, "replica": replica} if replica else own


def _member(name: str, value: Any) -> str:
    return f'"{name}":{canonical(value)}'


def _digest(record: Any) -> Any:
    return hashlib.sha256(canonical(record).encode())


def _versions(kind: str, spec: Mapping[str, Any]) -> dict[str, int]:
    """Versions {"guidance:apg": 1} of a strategy and those inside it; 1 if it declares none."""
    cls = registry.lookup(kind, spec["name"])
    found = {f"{kind}:{spec['name']}": getattr(cls, "version", 1)}
    for entry in cls.__dataclass_fields__.values():  # pyright: ignore[reportAttributeAccessIssue]
        nested, value = entry.metadata.get("kind"), spec.get(entry.name)
        if nested and isinstance(value, Mapping):
            found.update(_versions(nested, value))
    return found
