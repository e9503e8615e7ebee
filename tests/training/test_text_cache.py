"""fit.cache_text and fit.offload: the same run with each prompt encoded once."""

import gc
import json
import warnings

import pytest
import torch
from sampler_kernels import leaves, map_tree

import sampler
from sampler.core.errors import SamplerError
from sampler.training import placement
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.prompt_file import ConditionFile
from tests import tiny
from tests import tiny_transformers as tiny2
from tests.training import world

FULL = {"cache_text": True, "text_cache_mb": 0}  # all of it in the file
EVALUATED = {"eval_every": 1, "eval_prompts": ["a dog", "a bird"]}


def counted(monkeypatch, engine):
    """The (prompt, negative) of each call of the adapter's own `encode`, and the sizes of them."""
    calls, encode = [], type(engine.pipeline).encode

    def counting(self, prompts, negative, guided, size):
        calls.append((list(prompts), list(negative) if guided else None))
        return encode(self, prompts, negative, guided, size)

    monkeypatch.setattr(type(engine.pipeline), "encode", counting)
    return calls


@pytest.mark.parametrize("trainer", [*world.TRAINERS, "memory"])
def test_a_run_of_single_samples_is_the_same_to_the_byte(tmp_path, trainer):
    cache = {"cache_text": True} if trainer == "memory" else FULL
    trainer = "nft" if trainer == "memory" else trainer
    engine = world.engine(tiny2.lcm if trainer == "rlcm" else tiny.sd)
    for name, more in (("plain", {}), ("cached", cache)):
        world.tune(engine, tmp_path / name, trainer, updates=1, micro=1, **EVALUATED, **more)
    assert world.curve(tmp_path / "plain") == world.curve(tmp_path / "cached")
    assert world.weights(tmp_path / "plain") == world.weights(tmp_path / "cached")
    sheets = [(tmp_path / n / "eval" / "000001.png").read_bytes() for n in ("plain", "cached")]
    assert sheets[0] == sheets[1]
    assert not any((tmp_path / "cached" / "text_cache").iterdir())


@pytest.mark.parametrize("build", [tiny.sdxl, tiny.sd3, tiny2.qwen_image])
def test_families(tmp_path, build):
    """Texts of different lengths, pooled states, masks; images of one sample are equal bits."""
    engine = world.engine(build)
    size = {"height": 32, "width": 32}
    for name, more in (("plain", {}), ("cached", FULL)):
        world.tune(engine, tmp_path / name, "nft", updates=1, micro=1, **more, **size)
    assert world.curve(tmp_path / "plain") == world.curve(tmp_path / "cached")
    assert world.weights(tmp_path / "plain") == world.weights(tmp_path / "cached")


@pytest.mark.parametrize("limit", [0, 2048])
def test_each_text_is_encoded_once_and_alone(tmp_path, monkeypatch, limit):
    """Over updates, levels, evaluations and references; the negative prompt once in all."""
    engine = world.engine()
    calls = counted(monkeypatch, engine)
    options = {"micro": 2, "text_cache_mb": limit, "batch": 4, **EVALUATED}
    world.tune(engine, tmp_path, "nft", updates=3, cache_text=True, **options)
    assert all(len(prompts) == 1 for prompts, _ in calls)
    prompts = [prompts[0] for prompts, _ in calls]
    assert sorted(prompts) == sorted({*world.PROMPTS, "a dog", "a bird"})
    assert sum(negative is not None for _, negative in calls) == 1


def test_conditions_do_not_depend_on_the_micro_batch(tmp_path):
    """Bit for bit, so that what is left of a cut is what the network itself rounds."""
    adapter = world.engine().pipeline
    size, found = adapter.size(None, None), []
    for cut in (1, 2, 3):
        cache = PromptCache(adapter, 0, tmp_path / str(cut))
        parts = [world.PROMPTS[k : k + cut] for k in range(0, 3, cut)]
        conds = [cache.encode(part, [""] * len(part), True, size) for part in parts]
        trees = [[leaf for leaf in leaves((c.cond, c.uncond))] for c in conds]
        found.append([torch.cat(rows) for rows in zip(*trees, strict=True)])
        cache.close()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("limit", [0, 2048])
def test_a_run_that_breaks_goes_on_bit_equal(tmp_path, limit):
    """Also over what a killed process has left of its file."""
    engine, options = world.engine(), {"cache_text": True, "text_cache_mb": limit}

    def stop(record):
        if record["update"] == 3:
            raise KeyboardInterrupt

    world.tune(engine, tmp_path / "whole", "grpo", updates=4, **options)
    with pytest.raises(KeyboardInterrupt):
        world.tune(engine, tmp_path / "cut", "grpo", updates=4, progress=stop, **options)
    (tmp_path / "cut" / "text_cache" / "0.bin").write_bytes(b"left by a killed process")
    other = {**options, "text_cache_mb": 1}  # may change
    world.tune(engine, tmp_path / "cut", "grpo", updates=4, **other)
    assert world.curve(tmp_path / "whole") == world.curve(tmp_path / "cut")
    assert world.weights(tmp_path / "whole") == world.weights(tmp_path / "cut")
    with pytest.raises(SamplerError, match="differs in fit.cache_text"):
        world.tune(engine, tmp_path / "cut", "grpo", updates=4)


def test_a_file_holds_trees_of_every_kind(tmp_path):
    """Of any dtype and shape, read back bit for bit, also after more was written and it is gone."""
    torch.manual_seed(0)
    trees = [
        {"a": torch.randn(1, 3, 5), "b": (torch.tensor([True, False, True]), None, 7, "text")},
        {"a": torch.randn(1, 70).bfloat16(), "b": torch.tensor(3), "c": [torch.zeros(0, 4)]},
        {"a": torch.randn(2, 9).half()[:, ::2], "b": torch.arange(11, dtype=torch.int32)},
    ]
    file, found = ConditionFile(tmp_path / "sub" / "x.bin"), []
    places = []
    for tree in trees:
        places.append(file.add(tree))
        found.append(file.read(places[0]))
    found += [file.read(place) for place in places]
    file.remove()
    assert not (tmp_path / "sub" / "x.bin").exists()
    for ours, tree in zip(found, [trees[0]] * 3 + trees, strict=True):
        assert torch.equal(ours["a"], tree["a"]) and ours["a"].dtype == tree["a"].dtype

        def check(a, b):
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b

        map_tree(check, ours, tree)
    with warnings.catch_warnings(record=True, action="always") as told:
        del file, found, ours
        gc.collect()
    assert not told


class Part(torch.nn.Module):
    """A module that records where it is moved."""

    def __init__(self):
        super().__init__()
        self.places = []

    def to(self, device):
        self.places.append(str(device))
        return self


def test_parts_are_on_the_device_while_they_are_used():
    """By a stand-in for a device, since tests have the CPU alone."""

    class Adapter:
        def __init__(self, clamped=True):
            self.device, self.clamped = torch.device("cuda"), clamped
            self.pipe = pipe

        def encode(self, *texts):
            assert parts["text_encoder"].places[-1] == "cuda"
            return texts

        def decode(self, x):
            assert parts["vae"].places[-1] == "cuda"
            return x, self.clamped

        latents_of = decode

        def unclamped(self):
            return Adapter(False)

    parts = {"text_encoder": Part(), "text_encoder_2": Part(), "vae": Part(), "unet": Part()}
    pipe = type("Pipe", (), {"components": parts})()
    adapter = placement.waiting(placement.waiting(Adapter(), "text"), "vae")
    assert adapter.encode("a", "b") == ("a", "b")
    assert adapter.decode(1) == (1, True) and adapter.latents_of(2) == (2, True)
    assert adapter.unclamped().decode(3) == (3, False)
    assert parts["vae"].places == ["cuda", "cpu"] * 3
    assert parts["text_encoder"].places == parts["text_encoder_2"].places == ["cuda", "cpu"]
    assert parts["unet"].places == []


def test_a_run_with_waiting_parts_is_the_same(tmp_path, monkeypatch):
    """On the CPU, where nothing moves: the same bytes, and parts that are given back."""
    engine, moved = world.engine(), []
    monkeypatch.setattr("sampler.training.fit.check_placement", lambda *arguments: None)
    monkeypatch.setattr(placement, "_move", lambda parts, device: moved.append(len(parts)))
    world.tune(engine, tmp_path / "plain", "nft", cache_text=True)
    assert not moved
    options = {"cache_text": True, "offload": ("text", "vae")}
    world.tune(engine, tmp_path / "waiting", "nft", **options)
    assert len(moved) >= 10 and len(moved) % 2 == 0  # both at the ends, and around each use
    assert world.weights(tmp_path / "plain") == world.weights(tmp_path / "waiting")


@pytest.mark.parametrize(
    ("trainer", "build", "settings", "problem"),
    [
        ("nft", tiny.dit, {"cache_text": True}, "fit.cache_text: DiTPipeline has no text encoder"),
        ("nft", tiny.sd, {"text_cache_mb": 9}, "text_cache_mb needs cache_text = true"),
        ("nft", tiny.sd, {"offload": ["text"]}, "offload = .'text'. needs cache_text = true"),
        ("nft", tiny.sd, {"offload": ["vae"]}, "the model is in main memory already"),
        ("nft", tiny.sd, {"offload": ["unet"]}, "offload = .*unet.* must be"),
        ("alignprop", tiny.sd, {"offload": ["vae"]}, "gradient goes through the decoder"),
        ("srpo", tiny.sd, {"offload": ["vae"]}, "gradient goes through the decoder"),
        ("nft", tiny.dit, {"cache_text": True, "offload": ["text"]}, "has no text encoder"),
        ("prox_matching", tiny.sd, {"cache_text": True}, "fit.cache_text is of trainers that"),
    ],
)
def test_what_has_no_effect_is_one_sentence(tmp_path, trainer, build, settings, problem):
    spec = {**world.TRAINERS.get(trainer, {"name": trainer})}
    with pytest.raises((ValueError, SamplerError), match=problem) as error:
        sampler.finetune(
            world.engine(build), spec, "brightness", ["1"], tmp_path, 1,
            settings={"steps": 2, "batch": 2, **settings},
        )  # fmt: skip
    assert "\n" not in str(error.value) and not (tmp_path / "config.json").exists()


def test_the_settings_are_in_the_record(tmp_path):
    world.tune(world.engine(), tmp_path, "nft", updates=1, cache_text=True)
    fit = json.loads((tmp_path / "config.json").read_text())["fit"]
    assert fit["cache_text"] is True and fit["text_cache_mb"] == 2048 and fit["offload"] == []
