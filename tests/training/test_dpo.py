"""dpo: the loss of pairs against its formula, pairs of files and of rewards, memory, refusals."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image

import sampler
from sampler.core.noise import Noise
from sampler.engine import Engine
from sampler.models.trainable_lora import adapted
from sampler.training.batches import batch
from sampler.training.matching import pairs as module
from sampler.training.matching.dpo import DPO
from sampler.training.session import Session
from tests import tiny, tiny_transformers
from tests.training import world
from tests.training.test_matching import LEVELS, Weights, saved_bytes, velocity

SIZE = 16
SETTINGS = {"steps": 2, "batch": 4, "height": SIZE, "width": SIZE, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pairs of flat images: the lighter is chosen."""
    out = tmp_path_factory.mktemp("pairs")
    for name, value in (("light", 230), ("dark", 25)):
        Image.new("RGB", (SIZE, SIZE), (value,) * 3).save(out / f"{name}.png")
    lines = [
        {"prompt": f"a {word}", "chosen": "light.png", "rejected": "dark.png"}
        for word in ("dog", "cat", "car", "cup", "fox", "bee")
    ]
    (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def tune(engine, out, data, updates=2, trainer=None, prompts=(), **settings):
    """A run on the pairs of a folder or a table."""
    return sampler.finetune(
        engine,
        trainer={"name": "dpo", "data": str(data), "times": 2, **(trainer or {})},
        reward=None,
        prompts=prompts,
        out=out,
        updates=updates,
        settings={**SETTINGS, **settings},
    )


def test_the_loss_of_a_pair_is_that_of_the_formula(monkeypatch):
    """Off the base model, values and gradient; both members have one noise; an anchor."""
    weights, beta, anchor = Weights(new=(0.3, -0.2)), 3.0, 0.7

    def network(x, level=None, cond=None):
        return velocity(weights.theta, x, level)

    engine = Engine(sampler.denoiser(network, "velocity"))
    session = Session(
        engine, None, engine.sampler, engine.guidance, 4, (16, 16), 4, trainable=weights
    )
    torch.manual_seed(0)
    x0 = torch.randn(4, 3, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    pairs = module.Pairs([0, 1], x0, (5, 6), weight, sampler.Cond(), None)
    wanted, total = 0, torch.zeros(2, dtype=torch.float64)
    trainer = DPO(beta=beta, anchor=anchor)
    for number, (loss, metrics) in enumerate(module._losses(trainer, session, LEVELS, pairs)):
        (found,) = torch.autograd.grad(loss.sum(), weights.theta)
        total += found
        level = LEVELS[number]
        eps = Noise((5, 6)).draw(number, x0[::2], "renoise")[[0, 0]]
        x = level.alpha * x0[:2] + level.sigma * eps

        def error(theta, x=x, level=level, eps=eps):
            return (velocity(theta, x, level) - (eps - x0[:2])).square().mean(1)

        new, base = error(weights.theta), error((0.1, 0.4)).detach()
        gap = (base - new)[0] - (base - new)[1]
        wanted = wanted + (anchor * new[0] - torch.sigmoid(beta / 2 * gap).log()) / len(LEVELS)
        assert metrics["margin_chosen"][0] == pytest.approx(float((base - new)[0].detach()))
        assert metrics["margin_rejected"][0] == pytest.approx(float((base - new)[1].detach()))
        assert metrics["accuracy"][0] == float(gap > 0) and metrics["flat_groups"].tolist() == [
            0,
            1,
        ]
        assert loss[1] == 0
    (wanted,) = torch.autograd.grad(wanted, weights.theta)
    assert (total - wanted).norm() <= 1e-10 * wanted.norm()


def test_the_first_loss_is_log_2_and_the_pairs_are_learnt(folder, tmp_path):
    """At the levels of little noise, where a random network can tell the images apart."""
    spec = {"beta": 50.0, "times": 4, "low": 0.5}
    log = tune(world.engine(), tmp_path, folder, 8, spec, steps=4, batch=8, lr=1e-2).log
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["margin_chosen"] == log[0]["margin_rejected"] == log[0]["accuracy"] == 0.0

    def mean(name):
        return sum(record[name] for record in log[-5:]) / 5

    assert mean("accuracy") > 0.65 and mean("loss") < 0.63
    assert mean("margin_chosen") > mean("margin_rejected") + 0.005
    assert "reward" not in log[0]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["prompts"][0] == {
        "prompt": "a dog", "chosen": "light.png", "rejected": "dark.png"
    }  # fmt: skip


def test_a_table_in_another_folder_gives_the_same_run_and_a_cut_one_goes_on(folder, tmp_path):
    """Bit for bit, weights and log; the table's names are relative to its folder."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    text = "prompt,chosen,rejected\n"
    text += "".join(f"{r['prompt']},{r['chosen']},{r['rejected']}\n" for r in rows)
    (folder / "pairs.csv").write_text(text)
    engine = world.engine()
    tune(engine, tmp_path / "whole", folder, updates=3)
    for updates in (1, 3):
        tune(engine, tmp_path / "cut", folder / "pairs.csv", updates=updates)
    assert world.curve(tmp_path / "cut") == world.curve(tmp_path / "whole")
    assert world.weights(tmp_path / "cut") == world.weights(tmp_path / "whole")


def test_changed_images_are_another_run(folder, tmp_path):
    """They are read at every update: a run that went on would be of two data sets."""
    data, engine = tmp_path / "data", world.engine()
    shutil.copytree(folder, data)
    tune(engine, tmp_path / "run", data, updates=1)
    tune(engine, tmp_path / "run", data, updates=2)
    Image.new("RGB", (SIZE, SIZE), (26,) * 3).save(data / "dark.png")
    with pytest.raises(sampler.SamplerError, match="it differs in images") as found:
        tune(engine, tmp_path / "run", data, updates=3)
    assert found.value.code == 4


def test_a_group_gives_its_best_and_its_worst_image():
    latents = torch.arange(6.0)[:, None]
    rewards = [0.1, 0.3, 0.2, 0.5, 0.5, 0.5]
    found, weight = module._of_group(latents, rewards, 3, 0)
    assert found.flatten().tolist() == [1, 0] and weight == 1
    assert module._of_group(latents, rewards, 3, 1)[1] == 0


def test_groups_of_equal_rewards_are_not_evaluated(tmp_path):
    engine, calls = world.engine(), []
    forward = engine.pipeline.network.forward

    def counted(*arguments, **options):
        calls.append(torch.is_grad_enabled())
        return forward(*arguments, **options)

    engine.pipeline.network.forward = counted

    def reward(images, prompts):
        return torch.full((len(images),), 0.1)

    (record,) = world.tune(engine, tmp_path, "dpo", reward, updates=1, weight_decay=0.0).log
    assert record["flat_groups"] == 1.0 and record["grad_norm"] == 0.0 and not any(calls)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sd3])
def test_an_update_keeps_the_graph_of_one_forward_pass(build):
    """At most 1.05 times a plain one of the pair, whatever levels and groups are."""
    engine = world.engine(build)
    with adapted(engine.pipeline.network, 2, 2, ["to_q", "to_v"], 0) as adapter:
        for parameter in adapter.parameters.values():
            parameter.data.add_(0.01)
        session = Session(
            engine, None, engine.sampler, engine.guidance, 4, (16, 16), 2, trainable=adapter
        )
        grid, sizes = session.pipeline.grid(4, (16, 16)), []
        latents = torch.randn(2, *session.pipeline.latent_shape(16, 16))
        for size, levels in ((2, grid[1:2]), (4, grid[1:4])):
            trainer = DPO(group_size=size)
            rows = batch(["a dog"], size, 0, 0, size)
            pairs = module._pairs(trainer, session, rows, lambda row: (latents, 1.0), [0])
            losses = module._losses(trainer, session, levels, pairs)
            sizes.append(saved_bytes(lambda losses=losses: next(losses))[0])
        bare, _ = saved_bytes(lambda: module._errors(session, pairs, grid[1], 0))
    assert max(sizes) <= 1.05 * bare + 1024 and sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "chosen": "light.png"}', "rejected: a pair needs a text"),
        ('{"chosen": "light.png", "rejected": "dark.png"}', "prompt: a pair needs a text"),
        ('{"prompt": "a", "chosen": "light.png", "rejected": "no.png"}', "rejected: there is no f"),
        ('{"prompt": "a", "chosen": "light.png", "rejected": 3}', "rejected: a pair needs a text"),
        (
            '{"prompt": "a", "chosen": "light.png", "rejected": "dark.png", "seed": 1}',
            "'seed': a pair has the columns prompt, chosen, rejected alone",
        ),
        ("", "has no pair"),
        ('{"prompt": "a", "chosen": "wide.png", "rejected": "dark.png"}', "32 x 16 pixels"),
    ],
)
def test_a_wrong_pair_is_one_sentence(folder, tmp_path, line, problem):
    Image.new("RGB", (32, SIZE)).save(folder / "wide.png")
    (folder / "wrong.jsonl").write_text(line)
    with pytest.raises(sampler.SamplerError, match=problem) as error:
        tune(world.engine(), tmp_path, folder / "wrong.jsonl", updates=1)
    assert "\n" not in str(error.value) and error.value.code == 2


def test_what_cannot_be_trained_is_one_sentence(folder, tmp_path):
    for fields, prompts, problem in (
        ({}, ["a dog"], "the prompts of a run on pairs are those of data"),
        ({"data": None}, ["a dog"], "Trainer 'dpo' needs a reward"),
        ({"data": None}, [], "needs a reward"),
        ({"group_size": 1}, [], "group_size = 1 must be an integer of at least 2"),
        ({"data": "no such folder"}, [], "no such folder"),
    ):
        with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
            tune(world.engine(), tmp_path, folder, trainer=fields, prompts=prompts)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="matching blurs few-step models"):
        tune(world.engine(tiny_transformers.lcm), tmp_path, folder)
