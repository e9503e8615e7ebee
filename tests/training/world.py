"""Short fine-tuning runs of tiny pipelines."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import sampler
from tests import tiny

PROMPTS = ["a dog", "a cat", "a red car"]
SHORT = {"steps": 2, "batch": 2, "lr": 1e-2, "height": 16, "width": 16, "checkpoint_every": 2}
TRAINERS = {
    "alignprop": {"name": "alignprop", "truncation": "fixed", "k": 1},
    "ddpo": {"name": "ddpo", "min_count": 2, "buffer": 4},
    "nft": {"name": "nft", "group_size": 2, "times": 2, "memory": "slow"},
    "awm": {"name": "awm", "group_size": 2, "times": 2, "passes": 2},
    "dpo": {"name": "dpo", "group_size": 2, "times": 2},
    "grpo": {"name": "grpo", "group_size": 2, "passes": 2, "window": {"size": 1}},
    "srpo": {"name": "srpo", "positive": (), "negative": (), "low": 0.4, "high": 0.8},
    "rlcm": {"name": "rlcm", "min_count": 2, "buffer": 4, "clip_range": 0.01, "passes": 2},
}


def engine(build=tiny.sd, **options):
    return sampler.load(build(**options))


def tune(over, out, trainer="alignprop", reward="brightness", updates=2, progress=None, **settings):
    """`sampler.finetune` with small settings."""
    return sampler.finetune(
        over,
        trainer=TRAINERS.get(trainer, trainer) if isinstance(trainer, str) else trainer,
        reward=reward,
        prompts=PROMPTS,
        out=out,
        updates=updates,
        settings={**SHORT, **settings},
        progress=progress,
    )


def curve(out):
    """The log without what may differ between two runs of the same: wall time."""
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


def weights(out):
    """The bytes of the final adapter's tensors (the header's order is not fixed)."""
    tensors = load_file(Path(out) / "lora" / "pytorch_lora_weights.safetensors")
    return {key: value.numpy().tobytes() for key, value in tensors.items()}


def state(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
