"""The captioned composites and the tokenizer of their captions."""

import pytest
import torch

from sampler.bundled import FOLDER
from scripts.bundled.emoji_data import EmojiData, draw_sprites
from scripts.bundled.tokenizer import tokenizer_for


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return draw_sprites(tmp_path_factory.mktemp("shapes") / "sprites.npz")


@pytest.fixture(scope="module")
def data(sprites):
    return EmojiData(sprites)


def test_a_batch_is_a_function_of_its_key(data, sprites):
    first, again = data.batch(6, 1, 2), EmojiData(sprites).batch(6, 1, 2)
    assert torch.equal(first.images, again.images) and first.captions == again.captions
    assert not torch.equal(first.images, data.batch(6, 1, 3).images)
    assert not torch.equal(first.images, data.batch(6, 2, 2).images)
    assert first.images.shape == (6, 3, 64, 64) and first.images.abs().max() <= 1


def test_composites_show_the_sprite_on_its_background(data):
    batch = data.batch(64, 0, 0)
    corners = (batch.images[:, :, ::63, ::63].mean((2, 3)) + 1) / 2
    assert (corners - data.colours[batch.background]).abs().mean() < 0.06
    inside = batch.images[:, :, 20:44, 20:44].mean((2, 3))
    outside = data.colours[batch.background] * 2 - 1
    assert ((inside - outside).abs().amax(1) > 0.1).float().mean() > 0.85


def test_lettered_concepts_are_never_mirrored(data):
    draw = torch.Generator().manual_seed(0)
    uniform = torch.rand(1, 7, generator=draw)
    uniform[:, 5] = 0.5  # no rotation
    uniform[:, 3:5] = 0.5  # centred
    moon = torch.tensor([data.concepts.index("moon")])
    plain, mirrored = uniform.clone(), uniform.clone()
    plain[:, 6], mirrored[:, 6] = 0.9, 0.1
    one, other = (data._placed(moon, torch.tensor([1]), u) for u in (plain, mirrored))
    assert not torch.allclose(one, other, atol=0.1)
    torch.testing.assert_close(one, other.flip(-1), atol=1e-3, rtol=0)
    data.mirrored[moon] = False
    try:
        assert torch.equal(data._placed(moon, torch.tensor([1]), mirrored), one)
    finally:
        data.mirrored[moon] = True


def test_captions_follow_the_grammar(data):
    def caption(*words):
        return data.caption(3, 0, 7, list(words))

    assert caption(0.1, 0, 0, 0, 0) == ""
    assert caption(0.5, 0.9, 0.9, 0.9, 0) == "star"
    assert caption(0.5, 0, 0, 0, 0) == "a glossy star on a sky blue background"
    assert caption(0.5, 0, 0.9, 0, 0.9) == "a star on sky blue"
    captions = [text for i in range(8) for text in data.batch(64, 5, i).captions]
    assert 0.06 < captions.count("") / len(captions) < 0.18


def test_the_tokenizer_knows_every_caption_word_and_any_ascii(data):
    source = FOLDER / "pipeline" / "tokenizer"
    tokenizer = tokenizer_for(data, source)
    for word in ("circle", "moon", "glossy", "background"):
        assert len(tokenizer.tokenize(word)) == 1
    ids = tokenizer("Zebra & 7 owls?")["input_ids"]
    assert tokenizer.unk_token_id not in ids[:-1]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    again = tokenizer_for(data, source)
    assert again.get_vocab() == tokenizer.get_vocab()
