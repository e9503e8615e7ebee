"""Converts the published checkpoints of three rewards to folders that `sampler` loads.

    python -m scripts.rewards.convert aesthetic sac+logos+ava1-l14-linearMSE.pth OUT
    python -m scripts.rewards.convert hpsv2 HPS_v2.1_compressed.pt OUT --tokenizer CLIP-ViT-H-14
    python -m scripts.rewards.convert image_reward ImageReward.pt OUT --tokenizer bert-base-uncased

The checkpoints are pickles; they are read with torch's weights-only loader, which builds tensors
and nothing else. Every key and every shape must be accounted for. OUT gets `model.safetensors`,
`config.json` and a copy of the tokenizer files; the SHA-256 of the weights is printed.

--tokenizer: a folder with tokenizer files. HPSv2 takes CLIP's; ImageReward takes BERT's, to which
the two tokens that BLIP adds ([DEC], [ENC]) are added here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sampler.core.errors import first_line
from scripts.rewards.layouts import State, blip, matched, open_clip


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("aesthetic", "hpsv2", "image_reward"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    try:
        digest = convert(options.kind, options.checkpoint, options.out, options.tokenizer)
    except (OSError, ValueError) as error:
        print(f"convert_reward: {error}", file=sys.stderr)
        return 2
    print(f"{options.out / 'model.safetensors'}  sha256 {digest}")
    return 0


def convert(kind: str, checkpoint: Path, out: Path, tokenizer: Path | None = None) -> str:
    """Writes the folder `out` and returns the SHA-256 of its weights.

    Raises ValueError for a checkpoint with other keys or shapes than the published one.
    """
    state = read(checkpoint)
    if kind != "aesthetic" and tokenizer is None:
        raise ValueError(f"{kind} needs --tokenizer, a folder with tokenizer files.")
    out.mkdir(parents=True, exist_ok=True)
    if kind == "aesthetic":
        tensors = aesthetic(state)
    elif kind == "hpsv2":
        tensors, config = open_clip(state)
        tensors = check_clip(tensors, config, out, tokenizer)
    else:
        tensors, config = blip(state)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        words = save_tokenizer(tokenizer, out, ["[DEC]", "[ENC]"])
        if words != config["text"]["vocab_size"]:
            size = config["text"]["vocab_size"]
            raise ValueError(f"the tokenizer has {words} tokens, the checkpoint {size}.")
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors")
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def read(checkpoint: Path) -> State:
    """The tensors of a safetensors file or of a pickled state dict, read weights-only."""
    if checkpoint.suffix == ".safetensors":
        return load_file(checkpoint)
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        text = f"{checkpoint} is not a plain state dict: {first_line(error)}"
        raise ValueError(text) from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{checkpoint} holds other things than named tensors.")
    return {re.sub(r"^module\.", "", k): v for k, v in found.items()}


def aesthetic(state: State) -> State:
    """The head's five linear layers, named as in the checkpoint."""
    from sampler.rewards.heads import ScoreHead

    first = state.get("layers.0.weight")
    if first is None:
        raise ValueError("no aesthetic head: it has no layers.0.weight.")
    return matched(state, ScoreHead(first.shape[1]).state_dict(), "aesthetic head")


def check_clip(state: State, config: dict[str, Any], out: Path, tokenizer: Any) -> State:
    """The tensors, checked against transformers' own model; writes config and tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    made = CLIPConfig(**config)
    with torch.device("meta"):
        wanted = CLIPModel(made).state_dict()
    wanted = {k: v for k, v in wanted.items() if not k.endswith("position_ids")}
    made.architectures = ["CLIPModel"]
    made.save_pretrained(out)
    words = save_tokenizer(tokenizer, out)
    if words != config["text_config"]["vocab_size"]:
        size = config["text_config"]["vocab_size"]
        raise ValueError(f"the tokenizer has {words} tokens, the checkpoint {size}.")
    return matched(state, wanted, "open_clip checkpoint")


def save_tokenizer(source: Any, out: Path, extra: list[str] | None = None) -> int:
    """Copies a tokenizer from a local folder, with extra tokens; returns its size."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if extra:
        tokenizer.add_tokens(extra, special_tokens=True)
    tokenizer.save_pretrained(out)
    return len(tokenizer)


if __name__ == "__main__":
    sys.exit(main())
