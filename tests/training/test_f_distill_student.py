"""A distilled student at work: in the engine, in stock pipelines, and what it refuses."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline

import sampler
from sampler import registry
from tests import tiny
from tests.training import world
from tests.training.test_f_distill import tune

PROMPTS = ["a dog", "a cat", "a red car"]
SMALL = {"height": 16, "width": 16, "output": "latent"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Students of one step (full, LoRA) and of two."""
    root, engine = tmp_path_factory.mktemp("students"), world.engine()
    trainers = {
        "full": {},
        "lora": {"student": "lora"},
        "two": {"timesteps": (999, 499)},
    }
    return {
        name: tune(engine, root / name, 4, trainer={"ema": 0.0, **trainer}).lora
        for name, trainer in trainers.items()
    }


@pytest.fixture
def engine(folders):
    return sampler.load(tiny.sd(), student=folders["full"])


def counted(engine, monkeypatch):
    """The rows of every evaluation, by the network that was asked."""
    calls, adapter = [], engine.pipeline
    real = type(adapter).forward

    def forward(self, x, level, cond, model):
        calls.append((model, x.shape[0], level.t))
        return real(self, x, level, cond, model)

    monkeypatch.setattr(type(adapter), "forward", forward)
    return calls


def test_an_image_is_one_row_of_one_call(engine, monkeypatch):
    calls = counted(engine, monkeypatch)
    result = engine.generate(PROMPTS, steps=1, seeds=5, **SMALL)
    assert calls == [("student", 3, 999)] and result.nfe == [1, 1, 1]


@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_output_is_the_students_estimate_from_noise(folders, form):
    """G(z), computed with the stored weights and nothing of ours but the noise."""
    engine = sampler.load(tiny.sd(), student=folders[form])
    network, pipe = engine.pipeline.networks["student"], engine.pipeline.pipe
    made = engine.generate(PROMPTS[:1], steps=1, seeds=[7], **SMALL).latents
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    acp = pipe.scheduler.alphas_cumprod[999]
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(PROMPTS[:1], "cpu", 1, False)
        eps = network(z, 999, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(
        made, (z - (1 - acp).sqrt() * eps) / acp.sqrt(), rtol=1e-5, atol=1e-4
    )


def test_a_full_student_is_an_ordinary_pipeline(folders, engine):
    """The stock class from the folder alone gives our latents; so does our loader."""
    pipe = DiffusionPipeline.from_pretrained(folders["full"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    ours = engine.generate(PROMPTS[:2], steps=1, seeds=[3, 4], **SMALL).latents
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    call = {"height": 16, "width": 16, "output_type": "latent", "guidance_scale": 1.0}
    theirs = pipe(PROMPTS[:2], num_inference_steps=1, generator=generators, **call).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    alone = sampler.load(folders["full"])
    assert alone.pipeline.schedule.prediction == "eps"


def test_a_lora_student_goes_onto_its_stock_base(folders):
    pipe = tiny.sd()
    pipe.load_lora_weights(str(folders["lora"]))
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    ours = sampler.load(tiny.sd(), student=folders["lora"])
    ours = ours.generate(PROMPTS[:1], steps=1, seeds=[3], **SMALL).latents
    theirs = pipe(
        PROMPTS[:1], num_inference_steps=1, generator=[torch.Generator().manual_seed(3)],
        height=16, width=16, output_type="latent", guidance_scale=1.0,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    base = world.engine().generate(
        PROMPTS[:1], steps=1, seeds=[3], guidance="none",
        sampler={"name": "consistency", "timesteps": (999,)}, **SMALL,
    ).latents  # fmt: skip
    assert not torch.allclose(ours, base, atol=1e-3)


def test_a_student_of_two_steps_noises_again(folders, monkeypatch):
    engine = sampler.load(tiny.sd(), student=folders["two"])
    calls = counted(engine, monkeypatch)
    result = engine.generate(PROMPTS, steps=2, seeds=5, **SMALL)
    assert calls == [("student", 3, 999), ("student", 3, 499)] and result.nfe == [2, 2, 2]
    again = engine.generate(**result.config)
    assert torch.equal(again.latents, result.latents)
    first = engine.generate(PROMPTS, steps=1, seeds=5, **SMALL)
    assert calls[-1] == ("student", 3, 999) and not torch.equal(first.latents, result.latents)
    with pytest.raises(ValueError, match="3 steps, and there are 2 timesteps"):
        engine.generate(PROMPTS, steps=3, **SMALL)


def test_a_student_of_two_steps_learns_both(tmp_path):
    """The step is drawn per update; at the second, x is its own first image, noised again."""
    from sampler.training.batches import batch

    drawn = {batch(PROMPTS, 2, n, 0).random("step").randrange(2) for n in range(12)}
    assert drawn == {0, 1}
    seen, over = [], world.engine()

    def look(record):
        seen.append(record)

    tune(over, tmp_path, 8, look, trainer={"timesteps": (999, 499), "student_every": 1})
    # rows: z (and the step before), features, teacher's pair, fake
    assert {r["nfe"] - before for r, before in zip(seen, [0, *(r["nfe"] for r in seen)])} == {
        2 * 5,
        2 * 6,
    }


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"guidance": {"name": "student", "scale": 7.5}}, r"inside the weights: cfg at scale 2\b"),
        ({"negative": "a cat"}, r"negative prompt has no effect.*cfg at scale 2\b"),
        ({"sampler": "ddim", "steps": 4}, "trained at t = 999"),
        ({"steps": 2}, "2 steps, and there are 1 timesteps"),
        ({"guidance": {"name": "adaptive", "rule": "student"}}, "adaptive: rule = 'student'"),
        ({"guidance": {"name": "sum", "rules": ["student", "cfg"]}}, "sum: 'student'"),
    ],
)
def test_what_a_student_cannot_do_is_one_sentence(engine, monkeypatch, options, problem):
    calls = counted(engine, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=problem) as error:
            engine.generate("a dog", **{"steps": 1, **SMALL, **options})
    assert "\n" not in str(error.value) and calls == []


def test_without_a_student_the_rule_says_how_to_make_one():
    with pytest.raises(ValueError, match="sampler finetune --trainer f_distill.*--student DIR"):
        world.engine().generate("a dog", steps=1, guidance="student", **SMALL)


def test_the_teacher_is_still_there(engine):
    """The same engine gives the teacher's images with the teacher's rule and sampler."""
    options = {"steps": 3, "seeds": 1, "sampler": "ddim", "guidance": {"name": "cfg", "scale": 2}}
    ours = engine.generate("a dog", **options, **SMALL).latents
    assert torch.equal(ours, world.engine().generate("a dog", **options, **SMALL).latents)


def test_a_student_alone_is_a_model_of_a_denoiser():
    """In research, without a pipeline: the rule asks the model "student", and for nothing else."""
    model = sampler.denoiser(
        lambda x, level, cond: x * 0, "x0", {"student": lambda x, level, cond: x * 0 + 3}
    )
    levels = [sampler.Level(999, 0.1, 0.99), sampler.Level(0, 1.0, 0.0)]
    x = sampler.Engine(model).run(torch.ones(2, 3), levels, None, "consistency", "student")
    assert torch.equal(x, torch.full((2, 3), 3.0))
    with pytest.raises(ValueError, match="scale = 2 has no effect"):
        rule = {"name": "student", "scale": 2.0}
        sampler.Engine(model).run(torch.ones(2, 3), levels, None, "consistency", rule)
    assert registry.build("guidance", "student").needs == {"cond", "student"}


def test_the_manifest_says_what_the_student_is(folders):
    manifest = json.loads((folders["two"] / "manifest.json").read_text())
    told = {k: manifest[k] for k in ("kind", "f", "timesteps", "steps", "prediction", "form")}
    assert told == {
        "kind": "student", "f": "js", "timesteps": [999, 499], "steps": 2, "prediction": "eps",
        "form": "full",
    }  # fmt: skip
    assert manifest["baked_guidance"]["scale"] == 2.0 and manifest["negative_prompt"] is False
    assert (
        manifest["base"] == sampler.load(tiny.sd(), student=folders["two"]).pipeline.student["base"]
    )
    assert "/" not in json.dumps({k: v for k, v in manifest.items() if k != "trainer"})


def test_folders_that_are_no_students_are_refused(folders, tmp_path):
    def refused(match, pipe=None):
        with pytest.raises(sampler.SamplerError, match=match) as error:
            sampler.load(pipe or tiny.sd(), student=tmp_path / "s")
        assert error.value.code == 6 and "\n" not in str(error.value)

    refused("has no student.*sampler finetune --trainer f_distill")
    shutil.copytree(folders["full"], tmp_path / "s")
    refused("distilled from another model", tiny.sd(seed=1))
    weights = next((tmp_path / "s" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    refused("not an intact safetensors file")
    weights.unlink()
    refused("no safetensors weights")
    (tmp_path / "s" / "manifest.json").write_text('{"kind": "lora"}')
    refused("is not the manifest of a student")


def test_a_student_begins_as_another_one(folders, tmp_path):
    before = folders["full"] / "unet"
    report = tune(world.engine(), tmp_path, 0, trainer={"init": str(before)})
    engines = [sampler.load(tiny.sd(), student=f) for f in (report.lora, folders["full"])]
    ours, theirs = (e.generate("a", steps=1, seeds=1, **SMALL).latents for e in engines)
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="init needs student = 'full'"):
        tune(world.engine(), tmp_path, 0, trainer={"init": str(before), "student": "lora"})


def test_a_run_folder_is_as_good_as_the_students_own(folders):
    one = sampler.load(tiny.sd(), student=folders["full"])
    two = sampler.load(tiny.sd(), student=folders["full"].parent)
    options = {"steps": 1, "seeds": 1, **SMALL}
    assert torch.equal(one.generate("a", **options).latents, two.generate("a", **options).latents)
