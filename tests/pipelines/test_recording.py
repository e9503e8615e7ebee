"""Recording inside a network: nothing changes, nothing stays, and the probabilities are right."""

import threading
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention

import sampler
from sampler.pipelines.attention_call import probabilities
from sampler.pipelines.recording_hooks import recorded
from sampler.types import GuidanceBase
from tests import tiny

RUN = {"seeds": 1, "steps": 2, "output": "tensor", "height": 32, "width": 32}
CFG = {"name": "cfg", "scale": 3.0}


@pytest.fixture(scope="module")
def engines():
    made = {name: sampler.load(getattr(tiny, name)()) for name in ("sd", "sd3", "flux")}
    return {"bundled": sampler.load(), **made}


def hooks(network):
    return [
        (name, hook)
        for name, module in network.named_modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


@pytest.mark.parametrize("name", ["bundled", "sd", "sd3", "flux"])
def test_images_are_bit_equal_and_no_hook_stays(engines, name):
    engine = engines[name]
    before = engine.generate("a red fox", guidance=CFG, **RUN)
    processors = [id(getattr(m, "processor", m)) for m in engine.pipeline.network.modules()]
    blocks = engine.pipeline.blocks
    with engine.pipeline.recording(blocks, attention=True) as seen:
        inside = engine.generate("a red fox", guidance=CFG, **RUN)
    assert torch.equal(inside.images, before.images) and inside.nfe == before.nfe
    assert hooks(engine.pipeline.network) == []
    now = [id(getattr(m, "processor", m)) for m in engine.pipeline.network.modules()]
    assert now == processors
    assert set(seen.blocks) == set(blocks) and seen.attention
    for values in (*seen.blocks.values(), *seen.attention.values()):
        assert len(values) == 2 and all(len(v) == 2 and v.isfinite().all() for v in values)
    counts = {len(v) for v in seen.attention.values()}
    engine.generate("a red fox", guidance=CFG, **RUN)
    assert {len(v) for v in seen.attention.values()} == counts  # closed


@pytest.mark.parametrize("name", ["bundled", "sd", "sd3", "flux"])
def test_rows_of_attention_are_shares(engines, name):
    engine = engines[name]
    with engine.pipeline.recording(attention=True) as seen:
        engine.generate("a red fox", guidance="none", **RUN)
    for layer in seen.attention.values():
        rows = layer[0].sum(-1)
        assert (layer[0] >= 0).all()
        if name in ("bundled", "sd"):  # image tokens attend to text alone
            assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
        else:
            assert (rows > 0).all() and (rows < 1).all()


def test_probabilities_are_those_of_torchs_attention():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=g) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    for given in (None, mask, torch.randn(2, 1, 5, 5, generator=g).double()):
        right = torch.nn.functional.scaled_dot_product_attention(q, k, v, given)
        found = probabilities(q, k, given, None, False) @ v
        assert torch.allclose(found, right, atol=1e-12)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(probabilities(q, k, None, None, True) @ v, right, atol=1e-12)


def test_text_columns_of_joint_attention_follow_the_prompt(engines):
    """In one stream of text and image the recorded columns are the text's: a change of the image
    alone changes them, and their number is that of the text states."""
    engine = engines["flux"]
    states = engine.pipeline.encode(["a red fox"], [""], False, (32, 32)).cond
    length = states["encoder_hidden_states"].shape[1]
    with engine.pipeline.recording(attention=True) as seen:
        engine.generate("a red fox", guidance="none", **RUN)
    tokens = engine.pipeline.tokens((32, 32))
    assert {v[0].shape for v in seen.attention.values()} == {(1, tokens, length)}


def test_nothing_stays_after_an_exception(engines, monkeypatch):
    engine = engines["sd"]
    network = engine.pipeline.network
    before = engine.generate("a fox", **RUN).images
    with pytest.raises(KeyError), engine.pipeline.recording(("mid",), attention=True):
        broken = network.up_blocks[0].attentions[0].transformer_blocks[0].attn2
        with monkeypatch.context() as patch:
            patch.setattr(broken, "processor", lambda *a, **k: {}["no such thing"])
            engine.generate("a fox", **RUN)
    assert hooks(network) == []
    assert torch.equal(engine.generate("a fox", **RUN).images, before)


def test_another_threads_calls_are_not_recorded(engines):
    engine = engines["sd"]
    with engine.pipeline.recording(("mid",), attention=True) as seen:
        thread = threading.Thread(target=lambda: engine.generate("a fox", **RUN))
        thread.start()
        thread.join()
    assert seen.blocks == {"mid": []} and seen.attention == {}


def test_nag_inside_a_recording_is_untouched(engines):
    engine = engines["sd"]
    rule = {"name": "nag", "negative": "blurry"}
    before = engine.generate("a fox", guidance=rule, **RUN)
    with engine.pipeline.recording(attention=True) as seen:
        inside = engine.generate("a fox", guidance=rule, **RUN)
    assert torch.equal(before.images, inside.images)
    with engine.pipeline.recording(attention=True) as plain:
        engine.generate("a fox", guidance="none", **RUN)
    name = next(iter(seen.attention))  # the first step's attention is to the prompt itself
    assert torch.equal(seen.attention[name][0], plain.attention[name][0])


def test_refusals(engines):
    adapter = engines["sd"].pipeline
    with pytest.raises(
        ValueError, match=r"no block 'up.7'; it has input, down.0, down.1, mid, up.0"
    ):
        with adapter.recording(("up.7",)):
            pass
    with pytest.raises(ValueError, match="DiTTransformer2DModel is none of"):
        with sampler.load(tiny.dit()).pipeline.recording(attention=True):
            pass
    denoiser = sampler.denoiser(lambda x, level, cond: x)
    with pytest.raises(ValueError, match="this denoiser is a function"):
        denoiser.recording()


def test_other_processors_are_refused(engines):
    from diffusers.models.attention_processor import AttnProcessor

    engine = sampler.load(tiny.sd())
    engine.pipeline.network.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"\(AttnProcessor\) is not torch's.*'native'"):
        with engine.pipeline.recording(attention=True):
            engine.generate("a fox", **RUN)
    assert hooks(engine.pipeline.network) == []


def test_words_are_found_by_their_tokens(engines):
    bundled = engines["bundled"].pipeline
    prompt = "a hot dog on a red background"
    ((first, second),) = bundled.word_tokens([prompt], "Hot Dog")
    tokens = bundled.pipe.tokenizer(prompt)["input_ids"]
    names = bundled.pipe.tokenizer.convert_ids_to_tokens(tokens)
    assert names[first].startswith("hot") and names[second].startswith("dog")
    for name in ("sd3", "flux"):
        adapter = engines[name].pipeline
        (columns,) = adapter.word_tokens(["a red fox"], "fox")
        width = adapter.encode(["a red fox"], [""], False, (32, 32)).cond
        assert columns and max(columns) < width["encoder_hidden_states"].shape[1]
    (both,) = engines["sd3"].pipeline.word_tokens(["a red fox"], "fox")
    assert min(both) < 77 <= max(both)  # in CLIP's states and in T5's
    with pytest.raises(ValueError, match="'cat' is not in the prompt 'a fox'"):
        bundled.word_tokens(["a fox"], "cat")
    with pytest.raises(ValueError, match="word maps are for"):
        sampler.load(tiny.dit()).pipeline.word_tokens(["1"], "a")


class Watching(GuidanceBase):
    """CFG whose conditional branch is watched; keeps what it saw."""

    name = "watching"

    @property
    def needs(self):
        return frozenset({"cond", "uncond"})

    def __init__(self, score=None):
        self.score, self.seen = score, []

    def plan(self, x, span, cond, state):
        watch = sampler.types.Watch(self.score)
        return {
            "uncond": sampler.types.Branch(cond.uncond),
            "cond": sampler.types.Branch(cond.cond, watch=watch),
        }

    def combine(self, x, preds, span, state):
        self.seen.append(preds["cond"].seen)
        return preds["cond"], state


def test_a_branch_is_given_its_own_rows(engines):
    engine = engines["bundled"]
    rule = Watching()
    engine.generate(["a red fox", "a dog"], guidance=rule, **RUN)
    with engine.pipeline.recording(attention=True) as seen:
        engine.generate(["a red fox", "a dog"], guidance=Watching(), **RUN)
    for layer, values in rule.seen[0].items():
        assert torch.equal(values, seen.attention[layer][0][2:])  # [uncond; cond]


def gap(preds):
    """½‖c − u‖², the score that needs no classifier."""
    return 0.5 * (preds["cond"].out - preds["uncond"].out).tensor().square().flatten(1).sum(1)


def test_a_score_weighs_the_attention_and_leaves_no_graph(engines):
    engine = engines["sd"]
    rule = Watching(gap)
    images = engine.generate("a red fox", guidance=rule, **RUN).images
    plain = engine.generate("a red fox", guidance=Watching(), **RUN).images
    assert (images - plain).abs().max() < 1e-4 and not images.requires_grad
    assert all((v >= 0).all() and v.isfinite().all() for v in rule.seen[0].values())
    assert all(not v.requires_grad for v in rule.seen[0].values())
    assert any(v.sum() > 0 for v in rule.seen[0].values())


class UNet2DConditionModel(torch.nn.Module):
    """Two cross-attentions in a row, in a network of the name of one that has them."""

    def __init__(self):
        super().__init__()
        self.layers = [Attention(8, 6, heads=2, dim_head=4).double() for _ in range(2)]
        blocks = [torch.nn.ModuleDict({"attn2": layer}) for layer in self.layers]
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x, states):
        for layer in self.layers:
            x = x + layer(x, encoder_hidden_states=states)
        return x


def test_the_weighted_map_is_the_derivative_by_central_differences():
    """relu(∂s/∂A)·A of the last layer: s changes as its probabilities are moved."""
    torch.manual_seed(0)
    network, h = UNet2DConditionModel().eval(), 1e-5
    x, states = torch.randn(2, 3, 8).double(), torch.randn(2, 4, 6).double()
    with recorded(network, attention="grad") as seen:
        out = network(x, states)
    found = seen.weighted(out.square().flatten(1).sum(1))["blocks.1.attn2"]
    before = x + network.layers[0](x, encoder_hidden_states=states)
    layer: Any = network.layers[1]
    value = layer.to_v(states).unflatten(2, (2, -1)).transpose(1, 2)
    held = seen.full["blocks.1.attn2"][0].values.detach()

    @torch.no_grad()
    def score(weights):
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return float((before.detach() + layer.to_out[0](attended)).square().sum())

    right = torch.zeros_like(held)
    for at in range(held.numel()):
        step = torch.zeros_like(held).view(-1)
        step[at] = h
        step = step.view_as(held)
        right.view(-1)[at] = (score(held + step) - score(held - step)) / (2 * h)
    assert torch.allclose(found, (right.relu() * held).mean(1), atol=1e-6)
