"""The attention option: what each network takes, and what is refused before a step fails."""

import sys
import types

import pytest
import torch

import sampler
from sampler.models import attention
from sampler.models.attention import set_attention
from tests import tiny


def processors(network):
    return {type(module.processor).__name__ for module in network.modules()
            if getattr(module, "processor", None) is not None}  # fmt: skip


def test_auto_leaves_the_network_alone():
    unet = tiny.sd().unet
    before = dict(unet.attn_processors)
    set_attention(unet, "auto")
    assert unet.attn_processors == before


def test_native_is_torchs_own_on_unets_and_on_transformers():
    from diffusers.models.attention_processor import AttnProcessor

    unet = tiny.sd().unet
    unet.set_attn_processor(AttnProcessor())
    set_attention(unet, "native")
    assert processors(unet) == {"AttnProcessor2_0"}
    transformer = tiny.flux().transformer
    set_attention(transformer, "native")
    backends = {module.processor._attention_backend for module in transformer.modules()
                if hasattr(getattr(module, "processor", None), "_attention_backend")}  # fmt: skip
    assert {str(getattr(b, "value", b)) for b in backends} == {"native"}


def test_xformers_is_refused_without_a_gpu():
    with pytest.raises(sampler.SamplerError, match="needs a CUDA device.*'native'") as caught:
        set_attention(tiny.sd().unet, "xformers")
    assert caught.value.code == 6


def test_an_xformers_that_cannot_run_is_found_out_by_a_call(monkeypatch):
    def broken(q, k, v):
        raise NotImplementedError("No operator found for this attention:\ndetails")

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = broken
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention.torch, "randn", lambda *shape, **options: torch.zeros(shape))
    with pytest.raises(
        sampler.SamplerError, match=r"No operator found for this attention:\); install"
    ):
        attention._try_xformers(torch.device("cuda"))


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="'flash'.*auto, native, xformers"):
        set_attention(tiny.sd().unet, "flash")


def test_load_takes_the_option_for_what_it_reads_itself():
    network = sampler.load(attention="native").pipeline.network
    assert "AttnProcessor2_0" in processors(network)
    with pytest.raises(sampler.SamplerError, match="needs a CUDA device"):
        sampler.load(attention="xformers", device="cpu")
    with pytest.raises(ValueError, match="attention has no effect on a pipeline that is loaded"):
        sampler.load(tiny.sd(), attention="native")


@pytest.mark.gpu
def test_xformers_is_native_within_rounding():
    pytest.importorskip("xformers")
    pipe = tiny.sd()
    pipe.to("cuda", torch.float16)
    engine = sampler.load(pipe)
    images = []
    for name in ("native", "xformers"):
        set_attention(pipe.unet, name)
        images.append(engine.generate("a fox", seeds=1, steps=4, output="tensor").images)
    assert (images[0] - images[1]).abs().max() < 2e-2
