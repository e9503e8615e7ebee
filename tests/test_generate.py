"""From prompts to images on the bundled model: seeds, batches, counts, and what is refused."""

import hashlib
import json

import numpy as np
import pytest
import torch

import sampler
from sampler.core.snapshots import load_snapshot, save_snapshot

PROMPTS = ["a red apple on a blue background", "a dog on green", "a glossy rocket"]


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_the_recorded_config_makes_the_same_images(engine):
    first = engine.generate(PROMPTS, steps=3, n=2, sampler="ab")
    again = engine.generate(**first.config)
    assert [digest(a) for a in first.images] == [digest(b) for b in again.images]
    assert len(first.images) == 6 and first.images[0].size == (64, 64)
    assert first.nfe == [6] * 6 and first.seconds > 0
    assert len(set(first.seeds)) == 6 and first.seeds == again.seeds
    assert first.config["guidance"] == {
        "name": "cfg",
        "scale": 3.0,
        **{k: v for k, v in first.config["guidance"].items() if k not in ("name", "scale")},
    }


def test_seeds_as_one_number_as_a_list_and_derived(engine):
    run = lambda **o: engine.generate(PROMPTS[:2], steps=2, output="latent", **o)  # noqa: E731
    assert run(seeds=7).seeds == [7, 8]
    assert torch.equal(run(seeds=7).latents, run(seeds=[7, 8]).latents)
    assert run().seeds == run().seeds != run(n=1, seeds=0).seeds


def test_a_row_alone_equals_the_row_in_its_batch_to_rounding(engine):
    """Network kernels round differently with other neighbours; promised: 1e-5 of the largest."""
    together = engine.generate(PROMPTS, steps=6, seeds=[1, 2, 3], output="latent").latents
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate(prompt, steps=6, seeds=i + 1, output="latent").latents
        assert (alone[0] - together[i]).abs().max() <= 1e-5 * together.abs().max()


def test_micro_batches_of_a_fixed_size_are_bit_equal_however_much_follows(engine):
    cut = {"steps": 3, "seeds": 5, "batch_size": 2, "output": "latent"}
    assert torch.equal(
        engine.generate(PROMPTS, **cut).latents[:2], engine.generate(PROMPTS[:2], **cut).latents
    )


def test_outputs(engine):
    options = {"steps": 2, "seeds": 1}
    tensor = engine.generate(PROMPTS[0], output="tensor", **options)
    assert tensor.images.shape == (1, 3, 64, 64)
    assert 0 <= tensor.images.min() and tensor.images.max() <= 1
    pil = engine.generate(PROMPTS[0], **options).images[0]
    pixels = torch.frombuffer(bytearray(pil.tobytes()), dtype=torch.uint8).view(64, 64, 3)
    assert torch.equal(pixels, (tensor.images[0] * 255).round().byte().permute(1, 2, 0))
    latent = engine.generate(PROMPTS[0], output="latent", **options)
    assert latent.images is None and torch.equal(latent.latents, tensor.latents)


def test_negative_prompt_and_size_change_the_image(engine):
    plain = engine.generate(PROMPTS[0], steps=3, seeds=1, output="latent")
    against = engine.generate(PROMPTS[0], steps=3, seeds=1, negative="a dog", output="latent")
    assert not torch.equal(plain.latents, against.latents)
    wide = engine.generate(PROMPTS[0], steps=2, seeds=1, height=48, width=96)
    assert wide.images[0].size == (96, 48)


def test_progress_is_told_after_every_batch(engine):
    told = []
    engine.generate(
        PROMPTS, steps=1, batch_size=2, output="latent", progress=lambda *a: told.append(a)
    )
    assert told == [(2, 3), (3, 3)]


@pytest.mark.parametrize("method", ["ddim", {"name": "ddim", "eta": 1.0}, "ab"])
def test_a_snapshot_of_a_real_run_resumes_bit_equal(engine, tmp_path, method):
    adapter = engine.pipeline
    size = adapter.size(None, None)
    cond = adapter.encode(PROMPTS, [""] * 3, True, size)
    x = torch.randn(3, *adapter.latent_shape(*size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, grid = engine.start(x, adapter.grid(6, size), cond, method, seeds=[1, 2, 3])
        whole = list(engine.steps(first, grid, cond, method))
        save_snapshot(whole[2], tmp_path / "middle")
        *_, last = engine.steps(load_snapshot(tmp_path / "middle"), grid, cond, method)
    assert torch.equal(last.x, whole[-1].x) and last.nfe == (12, 12, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "No prompts"),
        ({"prompts": [3]}, "A prompt is a text"),
        ({"steps": 0}, "steps = 0 must lie in 1..1000"),
        ({"steps": 1001}, "must lie in 1..1000"),
        ({"n": 0}, "n = 0"),
        ({"seeds": -1}, "seed = -1"),
        ({"seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"negative": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"output": "jpeg"}, "'pil', 'tensor' or 'latent'"),
        ({"height": 63}, "height = 63"),
        ({"guidance": {"name": "cfg", "scale": float("nan")}}, "finite number"),
        ({"guidance": {"name": "cfg", "scale": float("inf")}}, "finite number"),
        ({"sampler": {"name": "ab", "order": 9}}, "order = 9"),
    ],
)
def test_wrong_options_are_refused_before_the_network_runs(engine, monkeypatch, options, message):
    monkeypatch.setattr(engine.pipeline, "forward", lambda *a: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=message) as error:
        engine.generate(**{"prompts": ["a dog"], **options})
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_and_torch_are_numbers():
    engine = sampler.load()
    kw = {"output": "latent", "guidance": "none"}
    expected = engine.generate("a fox", seeds=5, steps=2, n=2, **kw)
    given = {"seeds": np.int64(5), "steps": np.float32(2), "n": torch.tensor(2), **kw}
    result = engine.generate("a fox", **given)
    assert result.seeds == [5, 6] and torch.equal(result.latents, expected.latents)
    assert json.loads(json.dumps(result.config)) == result.config
    for seeds in (np.array([5, 6]), torch.tensor([5, 6]), (5, np.uint8(6)), iter([5.0, 6])):
        result = engine.generate("a fox", seeds=seeds, steps=2.0, n=2, **kw)
        assert torch.equal(result.latents, expected.latents)
    rule = {"name": "cfg", "scale": torch.tensor(3.0), "rescale": np.float32(0.5)}
    assert sampler.build("guidance", rule) == sampler.build(
        "guidance", {"name": "cfg", "scale": 3.0, "rescale": 0.5}
    )


@pytest.mark.parametrize(
    "option, words",
    [
        ({"seeds": "5"}, "seeds = '5' must be an integer"),
        ({"seeds": 5.5}, "seeds = 5.5 must be an integer"),
        ({"seeds": object()}, "seeds = <object .* must be an integer"),
        ({"steps": 2.5}, "steps = 2.5 must be an integer"),
        ({"steps": None}, "steps = None must be an integer"),
        ({"n": True}, "n = True must be an integer"),
        ({"n": float("inf")}, "n = inf must be an integer"),
        ({"batch_size": "4"}, "batch_size = '4' must be an integer"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"height": 32.5}, "height = 32.5 must be an integer"),
        ({"strength": 0.5}, "strength = 0.5 has no effect without image"),
        ({"strength": 0.5, "grid": "karras"}, "strength = 0.5 has no effect without image"),
        ({"strength": 0.5, "inputs": {}}, "strength = 0.5 has no effect without image"),
        ({"strength": "x", "image": torch.zeros(1, 3, 32, 32)}, "strength = 'x' must be a number"),
    ],
)
def test_wrong_numbers_are_named(option, words):
    with pytest.raises(ValueError, match=words):
        sampler.load().generate("a fox", **{"steps": 2, "height": 32, "width": 32, **option})
