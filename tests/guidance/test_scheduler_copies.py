"""Pipelines that step copies of their scheduler: parts of a run, or frames one by one."""

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import sampler
from sampler.guidance.cfg import CFG
from sampler.stock.forms import Given
from sampler.stock.frame_steps import frame_steps
from tests.classic.table import TINY
from tests.guidance.own_formula import STEPS, Pipe
from tests.tiny import sd

pytestmark = pytest.mark.filterwarnings("ignore")
S = 3.0
FORCING = "SkyReelsV2DiffusionForcingPipeline"


@dataclass(frozen=True)
class Seen(CFG):
    """CFG that notes the samples and the steps that it sees."""

    def combine(self, x, preds, span, state):
        NOTES.append((span.index, tuple(x.shape)))
        return super().combine(x, preds, span, state)


NOTES: list = []


@pytest.fixture(autouse=True)
def no_notes():
    NOTES.clear()


def test_frames_are_guided_as_one_video():
    recipe = TINY[FORCING]
    pipe = recipe.build(FORCING)
    plain = recipe.called(pipe)
    steps = len(pipe.scheduler.timesteps)
    with sampler.guide(pipe, Seen(scale=6.0)) as calls:
        guided = recipe.called(pipe)
    shapes = {shape for _, shape in NOTES}
    assert [index for index, _ in NOTES] == list(range(steps)) and calls.nfe == [2 * steps]
    assert len(shapes) == 1 and len(next(iter(shapes))) == 5 and next(iter(shapes))[2] > 1
    stock = recipe.called(pipe, guidance_scale=6.0)
    assert (guided - stock).abs().max() <= 1e-5 * stock.abs().max()
    assert (guided - plain).abs().max() > 1e-4
    assert type(pipe.scheduler) is UniPCMultistepScheduler


def test_the_sound_of_a_video_keeps_the_guidance_of_its_pipeline():
    recipe = TINY["LTX2Pipeline"]
    pipe = recipe.build("LTX2Pipeline")

    def made(scale):
        given = {**recipe.settings(type(pipe)), **recipe.inputs(type(pipe))}
        given |= {"guidance_scale": scale, "audio_guidance_scale": 3.0}
        out = pipe(**given, generator=torch.Generator().manual_seed(3))
        return out.frames, out.audio

    plain, stock = made(S), made(6.0)
    with sampler.guide(pipe, Seen(scale=6.0)) as calls:
        guided = made(S)
    for value, other in zip(guided, stock, strict=True):
        assert (value - other).abs().max() <= 1e-5 * other.abs().max()
    assert (guided[0] - plain[0]).abs().max() > 1e-4 and calls.nfe == [6]


def test_frames_at_several_levels_are_refused():
    recipe = TINY[FORCING]
    pipe = recipe.build(FORCING)
    before = recipe.called(pipe, ar_step=1, causal_block_size=1)
    with pytest.raises(ValueError, match=r"frames at several noise levels .*ar_step=0"):
        with sampler.guide(pipe, {"name": "cfg", "scale": S}):
            recipe.called(pipe, ar_step=1, causal_block_size=1)
    assert torch.equal(recipe.called(pipe, ar_step=1, causal_block_size=1), before)


def test_frames_at_another_timestep_are_not_stepped():
    """Those of a video that is continued."""
    video = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    given = Given(video[:, :, 1], video[:, :, 1], [video])
    found = frame_steps(given, 500.0, video, {"timestep": torch.tensor([[0.0, 500.0, 500.0]])})
    assert found is not None and found.places == [1, 2]
    assert found.is_due(video[:, :, 1]) and not found.is_due(video[:, :, 0])


class Copies(Pipe):
    """Steps a copy of its scheduler; `way` says for what."""

    way = "all"

    @torch.no_grad()
    def __call__(self, scale=S):
        cond, uncond = self.encode_prompt(["a fox"], "cpu", 1, True, ["ugly"])
        self.scheduler.set_timesteps(STEPS)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
        sound = x.flip(-1)
        self.copied = copy.deepcopy(self.scheduler)
        for i, t in enumerate(self.scheduler.timesteps):
            u, c = self.evaluated(x, t, cond, uncond)
            steps = self.copied if self.way == "all" or (self.way == "late" and i > 2) else None
            m = u + scale * (c - u)
            x = (steps or self.scheduler).step(m, t, x).prev_sample
            if self.way == "beside":
                sound = self.copied.step(m.flip(-1), t, sound).prev_sample
        return x


def built(way):
    pipe = Copies(**sd().components, requires_safety_checker=False)
    pipe.way = way
    return pipe


@pytest.mark.parametrize("way", ["all", "late"])
def test_steps_of_a_copy_are_guided(way):
    pipe = built(way)
    kind = type(pipe.scheduler)
    wanted = pipe(scale=5.0)
    with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}) as calls:
        assert (pipe() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert calls.nfe == [2 * STEPS]
    assert type(pipe.scheduler) is type(pipe.copied) is kind


def test_a_copy_that_steps_another_sample_is_refused():
    """Sound, say: a rule would reach the video alone."""
    pipe = built("beside")
    with pytest.raises(ValueError, match="took a step without a guided call"):
        with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}):
            pipe()


@pytest.mark.parametrize("name", ["TextToVideoZeroPipeline"])
def test_a_run_that_goes_on_with_a_copy_is_guided(name):
    recipe = TINY[name]
    pipe = recipe.build(name)
    plain = recipe.called(pipe)
    wanted = recipe.called(pipe, guidance_scale=5.0)
    with sampler.guide(pipe, {"name": "cfg", "scale": 5.0}):
        found = recipe.called(pipe)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found - plain).abs().max() > 1e-4
    assert torch.equal(recipe.called(pipe), plain)


def test_integer_parts_of_timesteps_are_taken_for_them():
    """SkyReels-V2 hands on `timesteps.long()`, whatever its scheduler."""
    base = FlowMatchEulerDiscreteScheduler(shift=3.0)
    exact, cut, other = (sampler.scheduler("ab", base) for _ in range(3))
    for one in (exact, cut, other):
        one.set_timesteps(7)
    assert any(t % 1 for t in exact.timesteps.tolist())
    a = b = x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    for t in exact.timesteps:
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(t)))
        a = exact.step(v, t, a, return_dict=False)[0]
        b = cut.step(v, t.long(), b, return_dict=False)[0]
    assert torch.equal(a, b)
    t = other.timesteps[1]
    with pytest.raises(ValueError, match="is not the next one of this run"):
        other.step(x, t.long().float(), x)
    other.step(x, other.timesteps[0].long(), x)
    with pytest.raises(ValueError, match="is not the next one of this run"):
        other.step(x, other.timesteps[2].long(), x)
