"""Laws of every reward, over the whole catalogue; what the guard refuses."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sampler
from sampler.core.errors import UsageError
from sampler.rewards.base import Prompt, as_reward
from sampler.rewards.heads import ScoreHead
from sampler.rewards.python import reward_from
from sampler.rewards.scoring import NonFiniteScore, score
from tests.rewards import worlds

PROMPTS = ["a dog on a red background", "a cat on blue", "a car on a sky blue background"]


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """A spec of every reward, over tiny random networks; converted ones have their own file."""
    root = tmp_path_factory.mktemp("rewards")
    clip = worlds.clip_folder(root / "clip")
    torch.manual_seed(1)
    (root / "head").mkdir()
    save_file(ScoreHead(24).state_dict(), root / "head" / "model.safetensors")
    vit = worlds.vision_folder(root / "vit", "vit")
    yolos = worlds.vision_folder(root / "yolos", "yolos")
    plain = ["brightness", "colourfulness", "colour_agreement", "classifier"]
    plain += ["compressibility", "incompressibility", "soft_compressibility"]
    return {
        **{name: name for name in plain},
        "clip": {"name": "clip", "path": clip},
        "clipscore": {"name": "clip", "path": clip, "scale": "clipscore"},
        "pickscore": {"name": "pickscore", "path": clip, "divisor": 26},
        "hpsv2": {"name": "hpsv2", "path": clip},
        "aesthetic": {"name": "aesthetic", "path": clip, "head": str(root / "head")},
        "vit": {"name": "classifier", "path": vit},
        "object_count": {"name": "object_count", "path": yolos, "label": "dog", "count": 2},
        "hard_count": {
            **{"name": "object_count", "path": yolos, "label": "dog", "count": 2},
            **{"counting": "hard", "threshold": 0.2},
        },
        "sum": {"name": "sum", "rewards": ["brightness", "compressibility"], "weights": [1, 0.1]},
        "target": {"name": "target", "reward": "brightness", "value": 0.9},
        "capped": {"name": "capped", "reward": "brightness", "value": 0.9},
        "zscore": {"name": "zscore", "reward": "colourfulness", "mean": 40, "std": 10},
        "contrast": {
            **{"name": "contrast", "reward": {"name": "clip", "path": clip}},
            **{"positive": "Real", "negative": "Oil", "k": 0.5},
        },
    }


CASES = [
    *(
        "brightness colourfulness colour_agreement classifier compressibility incompressibility "
        "soft_compressibility clip clipscore pickscore hpsv2 aesthetic vit object_count hard_count "
        "sum target capped zscore contrast"
    ).split()
]


def test_the_catalogue_is_covered(specs):
    named = {s if isinstance(s, str) else s["name"] for s in specs.values()}
    assert set(CASES) == set(specs)
    assert named == set(sampler.names("reward")) - {"image_reward", "votes"}  # tests of their own


@pytest.mark.parametrize("name", CASES)
def test_rows_are_independent_and_scores_repeat(specs, name):
    reward = sampler.build("reward", specs[name])
    torch.manual_seed(2)
    images = torch.rand(3, 3, 48, 40)
    together = score(reward, images, PROMPTS)
    again = score(reward, images, PROMPTS)
    alone = torch.cat([score(reward, images[b : b + 1], PROMPTS[b : b + 1]) for b in (2, 0, 1)])
    assert together.dtype == torch.float32 and together.shape == (3,)
    torch.testing.assert_close(together, again, rtol=0, atol=0)
    torch.testing.assert_close(together[[2, 0, 1]], alone, rtol=1e-5, atol=1e-5)
    assert name == "hard_count" or together.unique().numel() == 3


@pytest.mark.parametrize("name", CASES)
def test_differentiable_is_what_it_says(specs, name):
    reward = sampler.build("reward", specs[name])
    torch.manual_seed(3)
    images = torch.rand(2, 3, 32, 48, requires_grad=True)
    scores = score(reward, images, PROMPTS[:2])
    if not reward.differentiable:
        assert not reward(images.detach(), PROMPTS[:2]).requires_grad
        return
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    if name != "clipscore":  # 0 where the cosine is negative
        assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert not any(p.requires_grad for p in _parameters(reward))


def _parameters(reward):
    return [
        p
        for value in vars(reward).values()
        if isinstance(value, torch.nn.Module)
        for p in value.parameters()
    ]


def test_specs_are_plain_data_and_come_back(specs):
    from sampler import registry

    for spec in specs.values():
        reward = sampler.build("reward", spec)
        again = sampler.build("reward", json.loads(json.dumps(registry.spec_of(reward))))
        assert again == reward


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (torch.rand(1, 3, 32, 32) * 2 - 1, "in \\[0, 1\\]"),
        (torch.rand(1, 3, 32, 32) + 0.05, "in \\[0, 1\\]"),
        (torch.rand(1, 1, 32, 32), "\\[B, 3, H, W\\]"),
        (torch.rand(1, 3, 8, 32), "16 pixels"),
        (torch.rand(2, 3, 32, 32), "1 prompts for 2 images"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "float images"),
    ],
)
def test_images_of_another_range_or_shape_are_refused(images, problem):
    with pytest.raises(ValueError, match=problem):
        score(sampler.build("reward", "brightness"), images, ["a"])


def test_bad_answers_are_named():
    images = torch.rand(2, 3, 32, 32)

    def nan(images, prompts):
        return torch.tensor([0.5, float("nan")])

    with pytest.raises(NonFiniteScore, match="'nan' is not finite for image 1 \\('the second'\\)"):
        score(nan, images, ["the first", "the second"])
    with pytest.raises(sampler.SamplerError, match="one score per image.*\\(2, 3\\)"):
        score(lambda i, p: i.mean((2, 3)), images, ["a", "b"])
    with pytest.raises(sampler.SamplerError, match="not float"):
        score(lambda i, p: 0.5, images, ["a", "b"])


def test_wrong_fields_are_one_sentence():
    for spec, problem in [
        ({"name": "sum", "rewards": []}, "at least one"),
        ({"name": "sum", "rewards": ["brightness"], "weights": [1, 2]}, "2 weights for 1"),
        ({"name": "zscore", "reward": "brightness", "mean": 0, "std": 0}, "above 0"),
        ({"name": "soft_compressibility", "quality": 0}, "from 1 to 100"),
        ({"name": "colour_agreement", "border": 0.7}, "0.5"),
        ({"name": "target", "reward": "brightnes", "value": 1}, "did you mean 'brightness'"),
    ]:
        with pytest.raises(ValueError, match=problem):
            sampler.build("reward", spec)


def test_missing_files_are_named(tmp_path, specs):
    for spec in ({"name": "clip", "path": str(tmp_path / "no")}, {"name": "hpsv2", "path": "no"}):
        with pytest.raises(
            sampler.SamplerError, match="does not exist.*model.safetensors"
        ) as error:
            sampler.build("reward", spec).check()
        assert error.value.code == 6
    head = {**specs["aesthetic"], "head": str(tmp_path)}
    with pytest.raises(sampler.SamplerError, match="lacks model.safetensors"):
        sampler.build("reward", head).check()
    with pytest.raises(sampler.SamplerError, match="config.json, tokenizer.json"):
        sampler.build("reward", {"name": "image_reward", "path": str(tmp_path)}).check()


def test_arrays_and_lists_are_scores():
    images = torch.rand(2, 3, 32, 32)
    wanted = images.mean((1, 2, 3))
    for reward in (
        lambda i, p: i.numpy().mean((1, 2, 3)),
        lambda i, p: [float(image.mean()) for image in i],
        lambda i, p: [image.mean() for image in i],
        lambda i, p: tuple(np.float32(image.mean()) for image in i),
    ):
        found = score(reward, images, ["a", "b"])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted)
    with pytest.raises(sampler.SamplerError, match="a tensor \\[2\\], not tuple"):
        score(lambda i, p: (i.mean((1, 2, 3)), {}), images, ["a", "b"])


def test_a_reward_gets_the_metadata_of_its_prompts():
    images = torch.rand(2, 3, 32, 32)
    prompts = [Prompt("a", {"count": 3}), "b"]
    wanted = torch.tensor([3.0, 0.0])

    def third(images, prompts, metadata):
        assert prompts == ["a", "b"]
        return [entry.get("count", 0) for entry in metadata]

    def by_name(images, prompts, *, size=1, metadata=None):
        return third(images, prompts, metadata)

    def without(images, prompts, size=2):
        return [size, size]

    assert torch.equal(score(third, images, prompts), wanted)
    assert torch.equal(score(by_name, images, prompts), wanted)
    assert torch.equal(score(without, images, prompts), torch.tensor([2.0, 2.0]))
    total = sampler.build("reward", {"name": "sum", "rewards": (as_reward(third), "brightness")})
    torch.testing.assert_close(score(total, images, prompts), wanted + images.mean((1, 2, 3)))


def test_failures_of_a_reward_are_one_sentence():
    images = torch.rand(1, 3, 32, 32, requires_grad=True)

    def broken(images, prompts):
        return 1 / 0

    def detached(images, prompts):
        return images.detach().mean((1, 2, 3))

    detached.differentiable = True
    with pytest.raises(sampler.SamplerError, match="'broken' failed with ZeroDivisionError: div"):
        score(broken, images, ["a"])
    with pytest.raises(sampler.SamplerError, match="failed with TypeError: too many positional"):
        score(lambda images: images, images, ["a"])
    with pytest.raises(sampler.SamplerError, match="'detached' is marked differentiable, but its"):
        score(detached, images, ["a"])
    with torch.no_grad():
        assert score(detached, images, ["a"]).shape == (1,)


def test_a_reward_cannot_change_the_images():
    def brighter(images, prompts):
        return images.add_(1).mean((1, 2, 3))

    images = torch.rand(2, 3, 32, 32)
    before = images.clone()
    total = sampler.build("reward", {"name": "sum", "rewards": (as_reward(brighter), "brightness")})
    found = score(total, images, ["a", "b"])
    assert torch.equal(images, before)
    torch.testing.assert_close(found, 2 * before.mean((1, 2, 3)) + 1)


def test_python_rewards_need_permission():
    with pytest.raises(sampler.SamplerError, match="allow-python"):
        reward_from("tests.rewards.worlds:pictures")
    assert reward_from("tests.rewards.worlds:pictures", True).function is worlds.pictures
    with pytest.raises(sampler.SamplerError, match="was not found: tests.rewards.worlds has no"):
        reward_from("tests.rewards.worlds:nothing", True)
    nested = {"name": "capped", "reward": "tests.rewards.worlds:pictures", "value": 1.0}
    with pytest.raises(sampler.SamplerError, match="allow-python"):
        reward_from(nested)
    assert reward_from(nested, True).reward.function is worlds.pictures
    assert reward_from({"name": "target", "reward": "brightness", "value": 1.0}).value == 1


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import nowhere_at_all", "failed to import with ModuleNotFoundError: No module named"),
        ("1 / 0", "failed to import with ZeroDivisionError: division by zero"),
        ("def calm(:", "failed to import with SyntaxError"),
        ("calm = 3", "must be a function"),
        ("class calm:\n    def __init__(self, size): ...", "failed with TypeError"),
        ("calmer = 3", "has no 'calm' \\(did you mean 'calmer'"),
        (None, "has no own_rewards.py, and no module 'own_rewards' is installed"),
    ],
)
def test_errors_of_python_rewards_are_told_apart(tmp_path, monkeypatch, code, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    if code is not None:
        (tmp_path / "own_rewards.py").write_text(code)
    with pytest.raises(UsageError, match=problem) as error:
        reward_from("own_rewards:calm", True)
    assert "\n" not in str(error.value)


def test_a_reward_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    code = "from own_parts import mean\n\ndef calm(images, prompts):\n    return mean(images)\n"
    (tmp_path / "own_rewards.py").write_text(code)
    (tmp_path / "own_parts.py").write_text("def mean(images):\n    return images.mean((1, 2, 3))\n")
    images = torch.rand(2, 3, 32, 32)
    found = score(reward_from("own_rewards:calm", True), images, ["a", "b"])
    torch.testing.assert_close(found, images.mean((1, 2, 3)))
