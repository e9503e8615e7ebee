"""Maps of words: their sums by hand, and what they leave unchanged."""

import pytest
import torch

import sampler
from sampler.core.word_maps import token_grid, word_maps
from sampler.engine.inspection.attention import region, words_of
from tests import tiny

PROMPTS = ["a red apple on a blue background", "a dog on a green background"]
RUN = {"seeds": [1, 2], "steps": 4}
CFG = {"name": "cfg", "scale": 3.0}


@pytest.fixture(scope="module")
def engine():
    return sampler.load()


@pytest.fixture(scope="module")
def seen(engine):
    return engine.attention(PROMPTS, [["apple", "blue"], ["dog"]], guidance=CFG, **RUN)


def test_the_images_are_those_of_generate(engine, seen):
    plain = engine.generate(PROMPTS, guidance=CFG, output="tensor", **RUN)
    assert torch.equal(seen.images, plain.images)
    assert seen.nfe == plain.nfe and seen.seeds == plain.seeds


def test_maps_have_mean_one_and_are_of_their_words(engine, seen):
    assert [list(found) for found in seen.maps] == [["apple", "blue"], ["dog"]]
    for found in seen.maps:
        for values in found.values():
            assert values.shape == engine.pipeline.latent_shape(64, 64)[1:]
            assert values.mean() == pytest.approx(1) and values.min() >= 0
    every = engine.attention(PROMPTS[0], guidance=CFG, seeds=1, steps=4)
    assert list(every.maps[0]) == ["a", "red", "apple", "on", "blue", "background"]
    assert torch.allclose(every.maps[0]["apple"], seen.maps[0]["apple"], atol=1e-3)


def test_the_object_is_where_its_word_is(seen):
    """Attention to the object and to the background's colour are on different parts."""
    object_, colour = seen.maps[0]["apple"], seen.maps[0]["blue"]
    assert torch.corrcoef(torch.stack([object_.flatten(), colour.flatten()]))[0, 1] < 0
    assert object_[6:10, 6:10].mean() > object_[[0, -1]].mean()  # the object is in the middle


def test_the_sum_is_that_of_the_recorded_probabilities(engine):
    columns = engine.pipeline.word_tokens([PROMPTS[1]], "dog")
    with engine.pipeline.recording(attention=True) as recorded:
        found = engine.attention(PROMPTS[1], "dog", guidance="none", seeds=1, steps=2).maps[0]
    total = torch.zeros(16, 16)
    for layer in recorded.attention.values():
        for step in layer:
            own = step[0, :, columns[0]].sum(1)
            image = (own / own.mean()).view(1, 1, *token_grid(len(own), (16, 16)))
            total = total + torch.nn.functional.interpolate(image, (16, 16), mode="bilinear")[0, 0]
    assert torch.allclose(found["dog"], total / total.mean(), atol=1e-5)


@pytest.mark.parametrize("score", ["guidance", {"name": "classifier"}, "brightness"])
def test_scores_weigh_the_maps(engine, seen, score):
    if score == {"name": "classifier"}:
        score = sampler.build("reward", score)
    found = engine.attention(PROMPTS[:1], "apple", score=score, guidance=CFG, seeds=1, steps=4)
    plain = seen.maps[0]["apple"]
    assert (found.images[0] - seen.images[0]).abs().max() < 1e-3
    assert found.maps[0]["apple"].mean() == pytest.approx(1)
    assert not torch.allclose(found.maps[0]["apple"], plain, atol=1e-2)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_other_families(name):
    engine = sampler.load(getattr(tiny, name)())
    size = {"height": 32, "width": 32, "steps": 1, "seeds": 1}
    found = engine.attention("a red fox", ["fox"], guidance="none", **size)
    assert found.maps[0]["fox"].isfinite().all() and found.maps[0]["fox"].std() > 0


def test_refusals(engine):
    with pytest.raises(ValueError, match="'cat' is not in the prompt"):
        engine.attention(PROMPTS, "cat", **RUN)
    with pytest.raises(ValueError, match="use guidance 'cfg'"):
        engine.attention(PROMPTS, "a", score="guidance", guidance="none", **RUN)
    with pytest.raises(ValueError, match="differentiable"):
        engine.attention(PROMPTS, "a", score="compressibility", **RUN)
    with pytest.raises(ValueError, match="3 lists for 2 prompts"):
        engine.attention(PROMPTS, [["a"], ["a"], ["a"]], **RUN)
    with pytest.raises(ValueError, match="no reduced copy"):
        token_grid(7, (16, 16))


def test_word_maps_by_hand():
    layer = torch.tensor([[[0.5, 0.3], [0.1, 0.1], [0.2, 0.4], [0.0, 0.6]]])
    found = word_maps({"a": layer}, [[[0], [0, 1]]], (2, 2))
    assert torch.allclose(found[0, 0].flatten(), torch.tensor([2.5, 0.5, 1.0, 0.0]))
    assert torch.allclose(found[0, 1].flatten(), torch.tensor([0.8, 0.2, 0.6, 0.6]) / 0.55)
    assert words_of("a hot-dog, a Bus's 2nd wheel") == ["a", "hot-dog", "Bus's", "2nd", "wheel"]
    assert region(torch.tensor([[0.0, 1.0], [1.0, 2.0]])).int().tolist() == [[0, 0], [0, 1]]
    assert token_grid(15, (9, 5)) == (5, 3)  # odd sizes are rounded up
