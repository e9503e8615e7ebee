"""The trainer of learned proximal networks, on a tiny pipeline and latents from a file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sampler
from sampler.models.proximal_files import load_proximal
from sampler.objectives import proximal_matching_loss
from tests.training.world import PROMPTS, SHORT, engine

TRAINER = {"name": "prox_matching", "pretraining": 3, "stage": 1, "stages": 2, "hidden": 4}
SETTINGS = {**SHORT, "height": 32, "width": 32, "batch": 4, "micro": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Latents of two kinds, whose prompts say which."""
    path = tmp_path_factory.mktemp("data") / "latents.safetensors"
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, 16, 16, generator=g)
    prompts = json.dumps([PROMPTS[i % 3] for i in range(6)])
    save_file({"latents": latents}, path, {"prompts": prompts})
    return path


@pytest.fixture(scope="module")
def over():
    return engine()


def tune(over, data, out, updates, **settings):
    return sampler.finetune(
        over,
        trainer={**TRAINER, "data": str(data)},
        reward=None,
        prompts=PROMPTS,
        out=out,
        updates=updates,
        settings={**SETTINGS, **settings},
    )


@pytest.fixture(scope="module")
def run(over, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, tune(over, data, out, 5)


def test_stages_learning_rates_and_convexity(run):
    out, report = run
    assert report.lora == out / "lpn" and report.updates == 5
    gammas = [record["gamma"] for record in report.log]
    smallest = 0.16 * (4 * 16 * 16) ** 0.5
    assert gammas == pytest.approx([0, 0, 0, 2 * smallest, smallest])
    network = load_proximal(report.lora)
    assert network.config.shape == (4, 16, 16)
    assert all((layer.weight >= 0).all() for layer in network.lin[1:])
    assert any((layer.weight == 0).any() for layer in network.lin[1:])  # clipping had an effect
    assert all(0 < record["error"] < 2 for record in report.log)


def test_a_resumed_run_is_the_same(run, over, data, tmp_path):
    out, whole = run
    tune(over, data, tmp_path, 4)
    again = tune(over, data, tmp_path, 5)
    a, b = (load_file(report.lora / "model.safetensors") for report in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    losses = [[record["loss"] for record in report.log] for report in (whole, again)]
    assert losses[0] == losses[1]


def test_micro_batches_do_not_change_the_gradient(run, over, data, tmp_path):
    one = tune(over, data, tmp_path, 1, micro=4)
    first = run[1].log[0]
    assert one.log[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert one.log[0]["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


def test_the_rate_falls_after_the_pretraining(monkeypatch, over, data, tmp_path):
    """The steps of proximal matching have a tenth of the rate: seen by the optimiser."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    tune(over, data, tmp_path, 4)
    assert seen == pytest.approx([1e-2, 1e-2, 1e-2, 1e-3])


def test_own_samples_are_learnt_without_data(over, tmp_path):
    report = sampler.finetune(
        over,
        trainer={**TRAINER, "samples": 3},
        reward=None,
        prompts=PROMPTS,
        out=tmp_path,
        updates=1,
        settings=SETTINGS,
    )
    made = load_file(tmp_path / "samples" / "000000.safetensors")["latents"]
    assert made.shape == (3, 4, 16, 16) and report.log[0]["loss"] > 0


def test_the_network_denoises_in_generate(run, over):
    """The result takes the place of the pipeline's network: x0 = f(x / alpha) at every level."""
    lpn = load_proximal(run[1].lora)
    denoising = over.with_denoiser(sampler.denoiser(lpn, prediction="x0"))
    made = denoising.generate(
        PROMPTS[0], seeds=1, steps=2, height=32, width=32, guidance="none", output="latent"
    )
    assert made.latents.shape == (1, 4, 16, 16) and made.latents.isfinite().all()
    x0 = torch.zeros(1, 4, 16, 16)
    assert proximal_matching_loss(lpn(x0), x0, None).shape == (1,)


@pytest.mark.parametrize(("name", "value"), [("ema", 0.9), ("eval_every", 1)])
def test_what_has_no_effect_is_refused(over, data, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"fit.{name} is of trainers that change the model"):
        tune(over, data, tmp_path, 1, **{name: value})
