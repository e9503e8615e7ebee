"""Converted checkpoints answer as the original networks do, which `originals` writes out."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sampler
from sampler.rewards.preprocess import clip_pixels, padded_pixels
from scripts.rewards import convert as convert_reward
from tests.rewards import originals, worlds

PROMPTS = ["a fox", "on a hill by the sea"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    worlds.clip_tokenizer().save_pretrained(root / "clip")
    worlds.bert_tokenizer().save_pretrained(root / "bert")
    return root


def test_hpsv2(folders):
    tokenizer = worlds.clip_tokenizer()
    state = originals.random_state(originals.open_clip_shapes(len(tokenizer), 12))
    extra = {"attn_mask": torch.zeros(12, 12)}
    torch.save({"epoch": 3, "state_dict": {**state, **extra}}, folders / "HPS.pt")
    digest = convert_reward.convert("hpsv2", folders / "HPS.pt", folders / "hps", folders / "clip")
    written = (folders / "hps" / "model.safetensors").read_bytes()
    assert digest == hashlib.sha256(written).hexdigest()
    images = torch.rand(2, 3, 48, 40)
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )["input_ids"]
    wanted = originals.open_clip_cosine(state, padded_pixels(images, 32), tokens)
    found = sampler.build("reward", {"name": "hpsv2", "path": str(folders / "hps")})
    torch.testing.assert_close(found(images, PROMPTS), wanted, atol=1e-5, rtol=1e-4)


def test_image_reward(folders):
    words = len(worlds.bert_tokenizer()) + 2
    state = originals.random_state(originals.image_reward_shapes(words), seed=1)
    extra = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save({**state, **extra}, folders / "IR.pt")
    convert_reward.convert("image_reward", folders / "IR.pt", folders / "ir", folders / "bert")
    reward = sampler.build("reward", {"name": "image_reward", "path": str(folders / "ir")})
    images, prompts = torch.rand(2, 3, 40, 64, requires_grad=True), ["a red fox on blue", "a fox"]
    tokens = worlds.bert_tokenizer()(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    raw = originals.image_reward_forward(
        state, clip_pixels(images, 32), tokens["input_ids"], tokens["attention_mask"]
    )
    wanted = (raw - 0.16717363) / 1.03333949
    found = reward(images, prompts)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    ours, theirs = (torch.autograd.grad(s.sum(), images)[0] for s in (found, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert ours.abs().max() > 0


def test_aesthetic(folders):
    state = originals.random_state(originals.head_shapes(24), seed=2)
    torch.save(state, folders / "linear.pth")
    convert_reward.convert("aesthetic", folders / "linear.pth", folders / "head")
    clip = worlds.clip_folder(folders / "model")
    reward = sampler.build(
        "reward", {"name": "aesthetic", "path": clip, "head": str(folders / "head")}
    )
    images = torch.rand(2, 3, 32, 32)
    embedding = reward._clip.image(images)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    wanted = originals.head_forward(state, embedding)
    torch.testing.assert_close(reward(images, PROMPTS), wanted)


def test_foreign_checkpoints_are_refused(folders):
    shapes = originals.head_shapes(24)
    state = originals.random_state(shapes)
    for change, problem in [
        ({"layers.9.weight": torch.zeros(2)}, "1 keys are unknown, such as layers.9.weight"),
        ({"layers.2.bias": torch.zeros(5)}, "layers.2.bias is \\(5,\\) instead of \\(128,\\)"),
    ]:
        torch.save({**state, **change}, folders / "bad.pth")
        with pytest.raises(ValueError, match=problem):
            convert_reward.convert("aesthetic", folders / "bad.pth", folders / "bad")
    torch.save({k: v for k, v in state.items() if k != "layers.4.bias"}, folders / "bad.pth")
    with pytest.raises(ValueError, match="1 keys are missing, such as layers.4.bias"):
        convert_reward.convert("aesthetic", folders / "bad.pth", folders / "bad")
    torch.save(state, folders / "bad.pth")
    for kind in ("hpsv2", "image_reward"):
        with pytest.raises(ValueError, match="is unknown"):
            convert_reward.convert(kind, folders / "bad.pth", folders / "bad", folders / "clip")


def test_a_pickle_that_runs_code_is_refused(folders):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (folders / "ran",))

    torch.save({"layers.0.weight": Evil()}, folders / "evil.pth")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            convert_reward.__name__,
            "aesthetic",
            folders / "evil.pth",
            folders / "e",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2 and "not a plain state dict" in done.stderr
    assert "Traceback" not in done.stderr and not (folders / "ran").exists()
