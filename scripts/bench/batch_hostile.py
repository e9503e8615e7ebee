"""Untrusted input: fuzzed prompt files and configurations, file names, weights."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sampler.config import layers
from sampler.core.errors import SamplerError
from sampler.runs import metadata
from sampler.runs.folder import OutputOptions
from sampler.runs.planner import Planner
from sampler.runs.tables import read_table
from tests.runs.stub import MODEL, defaults, make, pictures, prompts

Row = tuple[str, Any, str]
ROWS = CONFIGS = 20_000
_PIECES = [
    "prompt", "seed", "steps", "scale", "a fox", '"', ",", "\t", "\n", "{", "}", "[", "]", ":", "-",
    "null", "1e999", "-1", "0", "99999999999999999999", "NaN", "true", "\x00", "\ud800", "\u202e",
    "__a__", "{a|b}", "sampler", "guidance.scale", "cfg", "&a", "*a", "!!python/object:os.system",
    "<<", "run", "model", "=cmd()", "\\u0000", "é", "😀", "%", "#", "'", "version", "limits",
]  # fmt: skip


def fuzz(folder: Path) -> Iterator[Row]:
    """Random prompt rows of every kind of file, and random configurations."""
    rng = random.Random(3)
    kinds = ("txt", "csv", "tsv", "jsonl")
    rows = _tried((_prompt_file(rng, folder, kinds[k % 4]) for k in range(ROWS)), _plan)
    yield "prompt rows", rows[0], f">= {ROWS}"
    yield "prompt rows: tracebacks", rows[1], "0"
    yield "prompt rows: slowest, s", f"{rows[2]:.3f}", "<= 2"
    yield "prompt rows: accepted", rows[3], ""
    configs = _tried((_config_file(rng, folder) for _ in range(CONFIGS)), _resolve)
    yield "configurations", configs[0], f">= {CONFIGS}"
    yield "configurations: tracebacks", configs[1], "0"
    yield "configurations: slowest, s", f"{configs[2]:.3f}", "<= 2"
    yield "configurations: accepted", configs[3], ""


def names(folder: Path) -> Iterator[Row]:
    """Malicious prompts and tags as parts of file names."""
    rng = random.Random(4)
    parts = ["../", "/", "..\\", "~", "CON", "\u202e", "a" * 300, "%2e%2e/", "{key}", "$(rm)", ";",
             "|", "é", "\ufeff", ".", " ", "-rf", "NUL.txt", "\u2215", "C:"]  # fmt: skip
    hostile = ["".join(rng.choices(parts, k=5)) for _ in range(5000)]
    table = [(f"f:{k}", {"prompt": text, "seed": k}) for k, text in enumerate(hostile)]
    output = OutputOptions("none", "{slug}-{index}")
    made = make(folder / "inside" / "run", table, output=output, batch_size=100, steps=1)
    outside = [p for p in folder.rglob("*") if p.is_file() and "run" not in p.parts]
    yield "hostile names", len(hostile), "5000"
    yield "images made", made[1].done, "5000"
    yield "files outside of the run folder", len(outside), "0"


def files(folder: Path) -> Iterator[Row]:
    """Mutated images and weights, and model folders that point at foreign code."""
    make(folder / "run", prompts(1))
    (image,) = pictures(folder / "run").values()
    rng = random.Random(5)
    tracebacks = read = 0
    for _ in range(2000):
        try:
            metadata.read_record(_mutated(image, rng))
            read += 1
        except SamplerError:
            pass
        except Exception:
            tracebacks += 1
    yield "mutated PNGs", 2000, "2000"
    yield "mutated PNGs: tracebacks", tracebacks, "0"
    yield "mutated PNGs: read, with a record that fits its key", read, ""
    yield from _weights(folder, rng)


# What a downloaded model folder may bring: (file, changes of its JSON), or (file, its content).
_EVIL = "open('MARK', 'w').close()\nclass Evil:\n    from_pretrained = print\n"
_CRAFTED: list[tuple[str, Any]] = [
    ("model_index.json", {"unet": ["evil_module", "Evil"]}),
    ("model_index.json", {"unet": ["os", "system"]}),
    ("model_index.json", {"unet": ["../evil_module", "Evil"]}),
    ("model_index.json", {"vae": ["diffusers.utils", "Evil"]}),
    ("model_index.json", {"_class_name": ["pipeline", "Evil"]}),
    ("model_index.json", {"_class_name": "os.system"}),
    ("model_index.json", {"custom_pipeline": "someone/evil"}),
    ("model_index.json", {"trust_remote_code": True}),
    ("unet/config.json", {"auto_map": {"AutoModel": "evil_module.Evil"}}),
    ("unet/config.json", {"_attn_implementation": "someone/evil"}),
    ("unet/config.json", {"nested": [{"trust_remote_code": True}]}),
    ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil_module.Evil"}}),
    ("text_encoder/config.json", {"_attn_implementation_internal": "someone/evil@main:x"}),
    ("text_encoder/config.json", {"_experts_implementation": "someone/evil"}),
    ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil_module.Evil"]}}),
    ("scheduler/scheduler_config.json", {"custom_pipeline": "someone/evil"}),
    ("pipeline.py", _EVIL),
    ("unet/modeling_evil.py", _EVIL),
    ("vae/autoencoder.py", _EVIL),
    ("unet/diffusion_pytorch_model.bin", None),
]  # fmt: skip


def folders(folder: Path) -> Iterator[Row]:
    """Model folders that point at foreign code, one at a time; the code would leave a mark."""
    import sampler
    from sampler.bundled import FOLDER

    (folder / "path").mkdir()
    mark = folder / "mark"
    evil = _EVIL.replace("MARK", str(mark))
    (folder / "path" / "evil_module.py").write_text(evil)
    sys.path.insert(0, str(folder / "path"))
    refused = 0
    for number, (name, what) in enumerate(_CRAFTED):
        model = folder / f"crafted{number}"
        shutil.copytree(FOLDER / "pipeline", model)
        path = model / name
        if isinstance(what, dict):
            path.write_text(json.dumps({**json.loads(path.read_text()), **what}))
        elif what is None:  # pickled weights in the place of safetensors
            (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
            path.write_bytes(pickle.dumps(_Mark(str(mark))))
        else:
            path.write_text(evil)
        try:
            sampler.load(model)
        except SamplerError as error:
            refused += error.code == 6 and "\n" not in str(error)
        shutil.rmtree(model)
    sys.path.pop(0)
    yield "crafted model folders", len(_CRAFTED), "20"
    yield "crafted model folders: refused in one sentence", refused, "20"
    yield "crafted model folders: foreign code that ran", int(mark.exists()), "0"


class _Mark:
    """Object that opens a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def _weights(folder: Path, rng: random.Random) -> Iterator[Row]:
    """Mutated headers of a safetensors file, through the check before a library opens it."""
    import sampler
    from sampler.bundled import FOLDER

    model = folder / "model"
    shutil.copytree(FOLDER / "pipeline", model)
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    sampler.load(model)  # whole, it loads: what is refused below is refused for the mutation
    refused = loaded = other = 0
    for _ in range(1000):
        bad = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(header)] = rng.randrange(256)
        weights.write_bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.3 else bad)
        try:
            sampler.load(model)
            loaded += 1
        except (SamplerError, ValueError):
            refused += 1
        except Exception:
            other += 1
    yield "mutated safetensors", 1000, "1000"
    yield "mutated safetensors: refused in one sentence", refused, ""
    yield "mutated safetensors: still valid and loaded", loaded, ""
    yield "mutated safetensors: tracebacks", other, "0"


def _tried(inputs: Iterator[Path], action: Callable[[Path], Any]) -> tuple[int, int, float, int]:
    """Return (inputs, tracebacks, slowest seconds, accepted)."""
    count = bad = accepted = 0
    slowest = 0.0
    for path in inputs:
        count += 1
        started = time.perf_counter()
        try:
            action(path)
            accepted += 1
        except SamplerError as error:
            bad += error.code != 2 or "\n" in str(error)
        except Exception:
            bad += 1
        slowest = max(slowest, time.perf_counter() - started)
    return count, bad, slowest, accepted


def _prompt_file(rng: random.Random, folder: Path, kind: str) -> Path:
    path = folder / f"fuzz.{kind}"
    line = "".join(rng.choices(_PIECES, k=rng.randint(1, 8)))
    if kind == "jsonl" and rng.random() < 0.7:
        line = json.dumps({rng.choice(_PIECES): rng.choice([line, 1, None, [], {"name": line}]),
                           "prompt": line})  # fmt: skip
    if kind in ("csv", "tsv") and rng.random() < 0.8:
        mark = "," if kind == "csv" else "\t"
        line = mark.join(["prompt", "seed", rng.choice(_PIECES)]) + "\n" + mark.join(
            rng.choices(_PIECES, k=3)
        )  # fmt: skip
    path.write_bytes(line.encode("utf-8", "surrogatepass"))
    return path


def _config_file(rng: random.Random, folder: Path) -> Path:
    path = folder / "fuzz.yaml"
    lines = []
    for _ in range(rng.randint(1, 5)):
        value = "".join(rng.choices(_PIECES, k=rng.randint(0, 4)))
        lines.append("  " * rng.randint(0, 2) + f"{rng.choice(_PIECES)}: {value}")
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return path


def _plan(path: Path) -> None:
    planner = Planner(MODEL, defaults(), 4)
    for _ in planner.jobs(read_table(path)):
        pass


def _resolve(path: Path) -> None:
    layers.resolve([layers.read_file(path)], [], [])


def _mutated(data: bytes, rng: random.Random) -> bytes:
    bad = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        bad[rng.randrange(len(bad))] = rng.randrange(256)
    return bytes(bad[: rng.randrange(len(bad))]) if rng.random() < 0.3 else bytes(bad)
