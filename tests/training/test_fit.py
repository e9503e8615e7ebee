"""A fine-tuning run as a whole: what it leaves alone, what it writes, how it goes on."""

import json
import math

import pytest
import torch
from PIL import Image

import sampler
from sampler import registry
from sampler.core.errors import UsageError
from sampler.evaluation.questions import QuestionScorer
from sampler.models.trainable_lora import TrainableLoRA
from sampler.training import checkpoint
from sampler.training.batches import batch
from sampler.training.dry_run import dry_run
from sampler.training.optimise import NonFinite, Optimiser
from sampler.training.prompts import read_prompts
from sampler.training.settings import Settings, settings_from
from sampler.training.stopping import stop_reason
from tests import tiny
from tests.training import world


@pytest.fixture(scope="module")
def engine():
    return world.engine()


def images(engine, **options):
    return engine.generate(["a dog"], seeds=3, steps=2, output="tensor", **options).images


def test_the_pipeline_is_as_before(engine, tmp_path):
    network = engine.pipeline.network
    before, made = world.state(network), images(engine)
    modules = [name for name, _ in network.named_modules()]
    flags = {n: p.requires_grad for n, p in network.named_parameters()}
    report = world.tune(engine, tmp_path)
    assert world.same(before, world.state(network))
    assert modules == [name for name, _ in network.named_modules()]
    assert flags == {n: p.requires_grad for n, p in network.named_parameters()}
    assert torch.equal(made, images(engine)) and not getattr(network, "peft_config", None)
    assert report.updates == 2 and report.stopped == ""
    assert [r["update"] for r in report.log] == [1, 2]
    assert report.log[-1]["images"] == 4 and report.log[-1]["grad_norm"] > 0


def test_only_the_adapter_has_gradients_and_off_is_the_base_model(engine, tmp_path):
    seen = {}

    def reward(pictures, prompts):
        network = engine.pipeline.network
        trained = {n for n, p in network.named_parameters() if p.requires_grad}
        seen["trained"] = trained
        seen["float"] = {p.dtype for p in network.parameters() if p.requires_grad}
        return pictures.mean((1, 2, 3))

    reward.differentiable = True
    world.tune(engine, tmp_path, reward=reward, updates=1)
    assert seen["trained"] and all(".lora_" in name for name in seen["trained"])
    assert seen["float"] == {torch.float32}


def test_adapter_off_gives_the_base_images_while_it_is_trained(engine, tmp_path):
    made, found = images(engine), []

    def look(record):
        network = engine.pipeline.network
        adapter = TrainableLoRA(network, {})
        adapter.disable()
        found.append(torch.equal(images(engine), made))
        adapter.enable()
        found.append(not torch.equal(images(engine), made))

    world.tune(engine, tmp_path, progress=look)
    assert found == [True, True, True, True]


@pytest.mark.parametrize(
    ("trainer", "ema"),
    [
        *((name, 0.5) for name in ("alignprop", "ddpo", "rlcm", "nft", "awm", "srpo")),
        *((name, 0) for name in ("alignprop", "nft")),  # nft: with old weights of its own
    ],  # grpo, dpo and votes: in files of their own
)
def test_a_run_that_breaks_goes_on_bit_equal(engine, tmp_path, trainer, ema):
    class Broken(Exception):
        pass

    calls = []

    def reward(pictures, prompts):
        calls.append(1)
        if len(calls) == breaks:
            raise Broken
        return pictures.mean((1, 2, 3))

    reward.differentiable = True
    breaks = 0
    whole = tmp_path / "whole"
    world.tune(engine, whole, trainer, reward, updates=5, seed=4, ema=ema)
    calls.clear()
    breaks = 7 if trainer == "srpo" else 4  # in the fourth update: it scores images twice
    cut = tmp_path / "cut"
    with pytest.raises(sampler.SamplerError, match="'reward' failed with Broken"):
        world.tune(engine, cut, trainer, reward, updates=5, seed=4, ema=ema)
    # three updates were done and the last even checkpoint was the second's: nothing is lost
    assert [p.name for p in checkpoint.complete(cut / "checkpoints")] == ["000002", "000003"]
    assert not getattr(engine.pipeline.network, "peft_config", None)
    world.tune(engine, cut, trainer, reward, updates=5, seed=4, ema=ema)
    assert world.curve(cut) == world.curve(whole) and len(world.curve(cut)) == 5
    assert world.weights(cut) == world.weights(whole)


def test_a_finished_run_is_not_made_again_and_can_be_lengthened(engine, tmp_path):
    world.tune(engine, tmp_path / "a", updates=2)
    told = []
    world.tune(engine, tmp_path / "a", updates=2, progress=told.append)
    assert told == []
    with pytest.warns(UserWarning, match="has 2 updates already, more than fit.updates = 1"):
        assert world.tune(engine, tmp_path / "a", updates=1).updates == 2
    world.tune(engine, tmp_path / "a", updates=4)
    world.tune(engine, tmp_path / "b", updates=4)
    assert world.curve(tmp_path / "a") == world.curve(tmp_path / "b")
    assert world.weights(tmp_path / "a") == world.weights(tmp_path / "b")


def test_another_run_is_not_mixed_in(engine, tmp_path):
    world.tune(engine, tmp_path, updates=1)
    with pytest.raises(sampler.SamplerError, match="differs in fit.lr, trainer.k") as error:
        trainer = {"name": "alignprop", "truncation": "fixed", "k": 2}
        world.tune(engine, tmp_path, trainer, updates=1, lr=0.5)
    assert error.value.code == 4


def test_a_run_of_an_earlier_version_goes_on_with_the_defaults_of_new_settings(engine, tmp_path):
    world.tune(engine, tmp_path, updates=1)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    assert record["fit"].pop("cache_text") is False
    assert record["trainer"].pop("vae_slices") is not None
    path.write_text(json.dumps(record))
    world.tune(engine, tmp_path, updates=2)
    assert len(world.curve(tmp_path)) == 2
    record = json.loads(path.read_text())
    del record["fit"]["cache_text"]
    path.write_text(json.dumps(record))
    with pytest.raises(sampler.SamplerError, match="it differs in fit.cache_text"):
        world.tune(engine, tmp_path, updates=3, cache_text=True)


def test_checkpoints_that_are_torn_are_passed_over(tmp_path):
    tensors = {"a": torch.ones(2)}
    for update in (1, 2, 3):
        kept = checkpoint.Checkpoint(update, tensors, tensors, {"trainer": None})
        checkpoint.save_checkpoint(tmp_path, kept, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["000002", "000003"]
    kept = checkpoint.Checkpoint(1_000_000, tensors, tensors, {"trainer": None})
    for update in (999_999, 1_000_000):
        checkpoint.save_checkpoint(tmp_path / "long", kept._replace(update=update), keep=1)
    (newest,) = checkpoint.complete(tmp_path / "long")
    assert newest.name == "1000000"
    (tmp_path / ".tmp-77").mkdir()
    (tmp_path / "000003" / "optimizer.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.warns(UserWarning, match=r"checkpoint .*000003 cannot be read \("):
        found = checkpoint.load_newest(tmp_path)
    assert found is not None and found.update == 2 and not (tmp_path / ".tmp-77").exists()
    checkpoint.save_checkpoint(tmp_path, found._replace(update=3), keep=2)
    again = checkpoint.load_newest(tmp_path)
    assert again is not None and again.update == 3
    state = json.loads((tmp_path / "000003" / "state.json").read_text())
    (tmp_path / "000003" / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.warns(UserWarning, match="its format is 2, not 1"):
        again = checkpoint.load_newest(tmp_path)
    assert again is not None and again.update == 2


def test_values_that_are_not_finite_are_skipped_and_told(engine, tmp_path):
    calls = []

    def reward(pictures, prompts):
        calls.append(1)
        scores = pictures.mean((1, 2, 3))
        if len(calls) == 2:  # the score
            return scores * float("nan")
        # the gradient alone: the root of zero
        return scores + (scores - scores.detach()).abs().sqrt() if len(calls) == 4 else scores

    reward.differentiable = True
    report = world.tune(engine, tmp_path, reward=reward, updates=5)
    skipped = [r.get("skipped", "") for r in report.log]
    assert [bool(s) for s in skipped] == [False, True, False, True, False]
    assert "is not finite for image 0" in skipped[1] and "gradient" in skipped[3]
    assert all(v.isfinite().all() for v in _adapter(tmp_path).values())


def _adapter(out):
    found = checkpoint.load_newest(out / "checkpoints")
    assert found is not None
    return found.adapter


def test_steps_before_one_that_is_not_finite_are_told(engine, tmp_path, monkeypatch):
    """They have changed the weights, though the rest of the update is skipped."""
    step, calls = Optimiser.step, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise NonFinite("The gradient is not finite.")
        return step(self, *arguments)

    monkeypatch.setattr(Optimiser, "step", failing)
    spec = {**world.TRAINERS["ddpo"], "minibatches": 2}
    (record,) = world.tune(engine, tmp_path, spec, updates=1, steps=3).log
    assert record["skipped"].endswith("steps of the update before it were made.")
    assert any(v.any() for k, v in _adapter(tmp_path).items() if "lora_B" in k)


def test_five_in_a_row_stop_the_run(engine, tmp_path):
    calls = []

    def reward(pictures, prompts):
        calls.append(1)
        return pictures.mean((1, 2, 3)) * (1 if len(calls) < 3 else float("inf"))

    reward.differentiable = True
    with pytest.raises(sampler.SamplerError, match="5 updates in a row were not finite") as error:
        world.tune(engine, tmp_path, reward=reward, updates=20)
    assert error.value.code == 3 and len(calls) == 7
    assert all(v.isfinite().all() for v in _adapter(tmp_path).values())


def flat_moment(out):
    """Adam's first moment after one step: 0.1 times the gradient."""
    found = checkpoint.load_newest(out / "checkpoints")
    assert found is not None
    keys = sorted(k for k in found.optimizer if k.endswith("exp_avg"))
    return torch.cat([found.optimizer[k].flatten() for k in keys])


@pytest.mark.parametrize("trainer", ["alignprop", "ddpo", "nft", "awm", "grpo", "dpo", "srpo"])
def test_micro_batches_do_not_change_the_gradient(engine, tmp_path, trainer):
    """To what float32 networks round differently in batches of another size."""
    grads = _cut_gradients(engine, tmp_path, trainer, "brightness")
    for other in grads[1:]:
        assert (other - grads[0]).norm() <= 3e-5 * grads[0].norm() > 0


@pytest.mark.parametrize("trainer", ["alignprop", "ddpo", "nft", "awm", "grpo", "dpo", "srpo"])
def test_the_cut_into_micro_batches_is_exact(tmp_path, trainer):
    """In float64, with a reward in float64: sums and shares do not depend on it."""
    double = sampler.load(tiny.sd().to(dtype=torch.float64))

    def reward(images, prompts):
        return images.double().mean((1, 2, 3))

    reward.differentiable = True
    grads = _cut_gradients(double, tmp_path, trainer, reward, adapter="full", cache_text=True)
    for other in grads[1:]:
        assert other.dtype == torch.float64
        assert (other - grads[0]).norm() <= 1e-6 * grads[0].norm() > 0


def _cut_gradients(over, tmp_path, trainer, reward, **settings):
    """The gradient of an update whose batch is cut in three ways."""
    batch = 6 if trainer in ("nft", "awm", "grpo", "dpo") else 5
    for micro in (batch, 4, 1):  # the last micro-batch of 4 is short
        options = {"updates": 1, "batch": batch, "micro": micro, "clip": 0, **settings}
        spec = {k: v for k, v in world.TRAINERS[trainer].items() if k != "passes"}
        report = world.tune(over, tmp_path / str(micro), spec, reward, **options)
        assert report.log[0]["nfe"] == batch * 2 * 2  # steps, branches
    return [flat_moment(tmp_path / str(micro)) for micro in (batch, 4, 1)]


@pytest.mark.parametrize("trainer", ["ddpo", "rlcm"])
@pytest.mark.parametrize("micro", [4, 2, 1])
def test_the_ratio_of_an_unchanged_policy_is_one(engine, tmp_path, trainer, micro):
    """Bit for bit: what is trained are the micro-batches that were collected."""
    spec = {**world.TRAINERS[trainer], "passes": 1}
    options = {"steps": 3, "batch": 4, "micro": micro}
    report = world.tune(engine, tmp_path, spec, updates=1, **options)
    assert report.log[0]["ratio"] == 1 and report.log[0]["ratio_std"] == 0
    assert report.log[0]["clipped"] == 0 and report.log[0]["grad_norm"] > 0


def test_minibatches_are_steps_on_a_part_of_the_batch(engine, tmp_path):
    """Two steps of half the batch each; how a half is cut into micro-batches does not matter."""
    logs = []
    for micro in (2, 1):
        spec = {**world.TRAINERS["ddpo"], "minibatches": 2, "clip_range": 0.5}
        out = tmp_path / str(micro)
        world.tune(engine, out, spec, updates=1, steps=3, batch=4, micro=micro)
        found = checkpoint.load_newest(out / "checkpoints")
        assert {int(v) for k, v in found.optimizer.items() if k.endswith("step")} == {2}
        logs.append(world.curve(out)[0])
    for key in ("loss", "ratio", "adapter_norm"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=2e-3)  # Adam enlarges rounding


@pytest.mark.parametrize("trainer", ["ddpo", "nft", "grpo", "dpo"])
def test_a_batch_has_as_many_steps_as_minibatches(engine, tmp_path, trainer):
    """Steps that do not divide it too; more of them than images or pairs are refused beforehand."""
    count = 8 if trainer == "dpo" else 4
    spec = {**world.TRAINERS[trainer], "minibatches": 3, "passes": 1}
    options = {"steps": 3, "batch": count, "clip": 0}
    world.tune(engine, tmp_path / "a", spec, updates=1, **options)
    found = checkpoint.load_newest(tmp_path / "a" / "checkpoints")
    assert found is not None
    assert {int(v) for k, v in found.optimizer.items() if k.endswith("step")} == {3}
    spec["minibatches"] = 5
    problem = f"{trainer}: minibatches = 5 optimiser steps need .* a batch has 4 of them"
    with pytest.raises(ValueError, match=problem):
        world.tune(engine, tmp_path / "b", spec, updates=1, **options)
    with pytest.raises(ValueError, match=problem):
        dry_run(engine, spec, "brightness", world.PROMPTS, {**world.SHORT, **options})
    spec["minibatches"] = 3
    dry_run(engine, spec, "brightness", world.PROMPTS, {**world.SHORT, **options})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"batch": 3}, "batch = 3 must be a multiple of 2"),
        ({"log_with": "wandbb"}, "unknown tracker 'wandbb'"),
        ({"evals": ["jugde"], "eval_every": 1}, "did you mean 'judge'"),
        ({"evals": ["a:b"], "eval_every": 1}, "allow_python"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(engine, settings, problem):
    with pytest.raises((ValueError, sampler.SamplerError), match=problem):
        dry_run(engine, world.TRAINERS["nft"], "brightness", world.PROMPTS, settings)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl, tiny.pixart])
@pytest.mark.parametrize(
    "trainer", ["alignprop", "ddpo", "rlcm", "nft", "awm", "grpo", "dpo", "srpo"]
)
def test_pipelines(tmp_path, build, trainer):
    report = world.tune(world.engine(build), tmp_path, trainer, updates=1)
    assert report.log[0]["grad_norm"] > 0


def test_bfloat16(engine, tmp_path):
    for trainer in ("alignprop", "rlcm"):
        out = tmp_path / trainer
        spec = {**world.TRAINERS[trainer], **({"passes": 1} if trainer == "rlcm" else {})}
        report = world.tune(engine, out, spec, updates=2, mixed_precision="bf16")
        assert all("skipped" not in r for r in report.log)
        assert {v.dtype for v in _adapter(out).values()} == {torch.float32}
    assert abs(report.log[0]["ratio"] - 1) < 1e-2


@pytest.mark.parametrize(
    ("trainer", "reward", "settings", "problem"),
    [
        ("alignprop", "compressibility", {}, "needs a differentiable reward; 'compressibility'"),
        ({"name": "alignprop", "truncation": "fixed", "k": 3}, "brightness", {}, "1..2"),
        ({"name": "alignprop", "truncation": "uniform", "high": 2}, "brightness", {}, "<= 1 of"),
        ("ddpo", "brightness", {"sampler": "ddim"}, "'ddim' with these settings draws none"),
        ("rlcm", "brightness", {"steps": 1}, "draws none in 1 step"),
        ("ddpo", "brightness", {"steps": 1}, "draws none in 1 step; use more steps"),
        ("ddpo", "brightness", {"sampler": {"name": "cps", "noisy": [5, 6]}}, "none in 2 steps"),
        ("ddpo", "brightness", {"sampler": {"name": "cps", "noise_level": 0}}, "draws none; use"),
        ({"name": "rlcm", "final_step": "pathwise"}, "compressibility", {}, "differentiable"),
        ("alignprop", {"name": "hpsv2", "path": "nowhere"}, {}, "does not exist"),
        ("alignprop", "brightness", {"steps": 2000}, "steps = 2000"),
        ("alignprop", "brightness", {"targets": ["to_q", "to_w"]}, "no layer 'to_w' .did you mean"),
        ("alignprop", "brightness", {"init_lora": "nowhere"}, "nowhere does not exist"),
        (
            {"name": "ddpo", "advantage": "group", "group_size": 3},
            "brightness",
            {},
            "multiple of 3",
        ),
        ("alignprop", "brightness", {"stop_reward": 1.0}, "eval_every"),
        ("alignprop", "brightness", {"learning_rate": 1}, "no key 'learning_rate'"),
        ("alignprop", "brightness", {"lr": "fast"}, "fit: lr = .fast."),
        ("alignprop", "tests.training.world:curve", {}, "allow-python"),
        ("alignprob", "brightness", {}, "did you mean 'alignprop'"),
    ],
)
def test_bad_input_is_one_sentence_before_any_sampling(
    engine, tmp_path, monkeypatch, trainer, reward, settings, problem
):
    def never(*args, **kwargs):
        raise AssertionError("the network was called")

    monkeypatch.setattr(engine.pipeline, "forward", never)
    with pytest.raises((ValueError, sampler.SamplerError), match=problem) as error:
        world.tune(engine, tmp_path, trainer, reward, **settings)
    assert "\n" not in str(error.value)
    assert not getattr(engine.pipeline.network, "peft_config", None)


def test_a_reward_of_the_wrong_shape(engine, tmp_path):
    def reward(pictures, prompts):
        return pictures.mean()

    with pytest.raises(sampler.SamplerError, match="one score per image, a tensor \\[2\\]"):
        world.tune(engine, tmp_path, "ddpo", reward)


@pytest.mark.parametrize("trainer", ["alignprop", "ddpo"])
def test_parts_of_a_sum_are_in_every_record(engine, tmp_path, trainer):
    reward = {"name": "sum", "rewards": ["brightness", "soft_compressibility"], "weights": [2, 0.5]}
    report = world.tune(engine, tmp_path, trainer, reward, updates=1, eval_every=1)
    assert [record["kind"] for record in report.log] == ["eval", "update", "eval"]
    for record in report.log:
        parts = [record["reward_brightness"], record["reward_soft_compressibility"]]
        assert record["reward"] == pytest.approx(2 * parts[0] + 0.5 * parts[1], rel=1e-5)


def test_a_module_as_reward_collects_no_gradients(engine, tmp_path):
    class Score(torch.nn.Module):
        differentiable = True

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images, prompts):
            return self.weight * images.mean((1, 2, 3))

    own = Score()
    report = world.tune(engine, tmp_path, reward=own, updates=1)
    assert report.log[0]["grad_norm"] > 0
    assert own.weight.grad is None and own.weight.requires_grad


def test_an_evaluation_that_is_not_finite_is_recorded(engine, tmp_path):
    sizes = []

    def reward(pictures, prompts):
        sizes.append(len(pictures))
        scores = pictures.mean((1, 2, 3))
        return torch.where(torch.tensor([p == "a cat" for p in prompts]), math.nan, scores)

    options = {"eval_every": 1, "patience": 2, "eval_prompts": ["a dog", "a cat", "a dog"]}
    told = []
    report = world.tune(
        engine, tmp_path, "ddpo", reward, updates=2, progress=told.append, **options
    )
    found = [record for record in report.log if record["kind"] == "eval"]
    assert [record["reward"] for record in found] == [None, None, None]
    assert [record["not_finite"] for record in found] == [[1], [1], [1]]
    assert max(sizes) == 2, "scored in micro-batches"
    assert report.stopped == "2 evaluations brought no better reward"
    assert told == report.log
    json.dumps(told, allow_nan=False)


def test_a_run_that_was_stopped_by_patience_goes_on(engine, tmp_path):
    options = {"eval_every": 1, "eval_prompts": ["a dog"]}
    report = world.tune(engine, tmp_path, updates=4, max_drift=1e-12, **options)
    assert report.updates == 1 and report.stopped
    report = world.tune(engine, tmp_path, updates=4, patience=50, **options)
    assert report.updates == 4 and not report.stopped
    whole = world.tune(engine, tmp_path / "whole", updates=4, **options)
    assert world.curve(tmp_path) == world.curve(whole.folder)


def test_evaluations_and_stop_rules(engine, tmp_path):
    options = {"eval_every": 2, "eval_prompts": ["a dog", "a cat"], "checkpoint_every": 3}
    report = world.tune(engine, tmp_path, updates=5, **options)
    found = [(r["kind"], r["update"]) for r in report.log]
    assert [u for kind, u in found if kind == "eval"] == [0, 2, 4, 5]
    assert report.log[0]["drift"] == 0 and report.log[-1]["drift"] > 0
    assert sorted(p.name for p in (tmp_path / "eval").iterdir())[0] == "000000.png"
    report = world.tune(engine, tmp_path / "b", updates=9, max_drift=1e-12, **options)
    assert report.updates == 2 and "drift" in report.stopped
    settings = Settings(eval_every=1, patience=2)
    rewards = [{"reward": r, "drift": 0.0} for r in (1.0, 3.0, 2.0, 2.5)]
    assert stop_reason(settings, rewards[:3]) == "" and "2 evaluations" in stop_reason(
        settings, rewards
    )
    assert "reached 2.5" in stop_reason(Settings(eval_every=1, stop_reward=2.5), rewards)


def test_evaluations_log_further_scorers_and_stop_by_them(engine, tmp_path):
    texts = ["a dog", "a cat", "a fox"]
    watch = {"eval_every": 1, "eval_prompts": texts, "evals": ["brightness", "saturation"]}
    report = world.tune(engine, tmp_path / "a", reward="colourfulness", updates=2, **watch)
    evaluations = [r for r in report.log if r["kind"] == "eval"]
    assert [len(e["evals"]["brightness"]) for e in evaluations] == [3, 3, 3]
    for e in evaluations:
        assert e["eval_saturation"] == pytest.approx(sum(e["evals"]["saturation"]) / 3)
    again = world.tune(engine, tmp_path / "b", reward="colourfulness", updates=1, **watch)
    assert again.updates == 1
    again = world.tune(engine, tmp_path / "b", reward="colourfulness", updates=2, **watch)
    assert [r for r in again.log if r["kind"] == "eval"] == evaluations
    assert world.weights(tmp_path / "a") == world.weights(tmp_path / "b")


def test_evaluations_have_the_means_of_sampler_evaluate(engine, tmp_path, monkeypatch):
    """The categories of dpg are shares of all questions, so that prompts have weights."""

    class Answers:
        def probabilities(self, image, question, answers):
            return [0.9 if "red" in question else 0.1, 0.5][: len(answers)]

    monkeypatch.setattr(QuestionScorer, "_network", Answers())
    monkeypatch.setattr(QuestionScorer, "fingerprint", "0" * 20)
    rows = [("a dog", "a dog ?"), ("a dog", "a big dog ?"), ("a dog", "an old dog ?")]
    rows += [("a cat", "a red cat ?"), ("a fox", "")]
    lines = [{"prompt": p, "q": q or "a fox ?", "category": "kind" if q else ""} for p, q in rows]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts, spec = ["a dog", "a cat", "a fox", "a cat"], f"dpg:{questions}:model=some/vlm"
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for number, text in enumerate(texts):
            Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "prompt": text}) + "\n")
    expected = sampler.evaluate(folder, spec, out=tmp_path / "out")["dpg-like(vlm).kind"].mean
    watch = {"eval_every": 1, "eval_prompts": texts, "evals": [spec]}
    (record,) = world.tune(engine, tmp_path / "run", updates=0, **watch).log
    assert record["eval_dpg-like(vlm).kind"] == expected == 0.25
    assert record["evals"]["dpg-like(vlm).kind"] == [0, 1, None, 1]
    assert record["eval_weights"] == {"dpg-like(vlm).kind": [3, 1, 0, 1]}


@pytest.mark.parametrize("heavy", [0, 1])
@pytest.mark.parametrize("rule", ["stop", "drift_stop"])
def test_stop_rules_weigh_prompts_as_the_means_do(heavy, rule):
    """Half of the prompts fall by a half and the others rise by it: the heavy ones decide."""
    texts = tuple(f"prompt {k}" for k in range(30))
    settings = Settings(
        eval_every=1,
        eval_prompts=texts,
        evals=("s",),
        **{rule: {"scorer": "s", "worse_by" if rule == "stop" else "above": 0.1}},
    )
    before = {"s": [1.0] * 30}
    after = {"s": [0.5, 1.5] * 15}
    weights = {"s": [100.0, 1.0] * 15 if heavy == 0 else [1.0, 100.0] * 15}
    records = [
        {"evals": evals, "base_evals": before, "eval_weights": weights, "drift": 0.0}
        for evals in (before, after)
    ]
    assert bool(stop_reason(settings, records)) == (heavy == (rule == "drift_stop"))


def test_a_run_stops_when_a_watched_score_fell_by_more_than_chance():
    texts = tuple(f"prompt {k}" for k in range(30))
    settings = Settings(
        eval_every=1,
        eval_prompts=texts,
        evals=("judge",),
        stop={"scorer": "judge", "worse_by": 0.2},
    )

    def log(*shifts):
        return [
            {
                "drift": 0.0,
                "evals": {"judge": [k / 30 + shift + noise * (-1) ** k for k in range(30)]},
            }
            for shift, noise in shifts
        ]

    assert stop_reason(settings, log((0, 0))) == ""
    assert stop_reason(settings, log((0, 0), (-0.1, 0))) == ""  # not by enough
    assert stop_reason(settings, log((0, 0), (-0.3, 2))) == ""  # within the noise of the prompts
    assert "judge fell by 0.3, more than 0.2" in stop_reason(settings, log((0, 0), (-0.3, 0.1)))
    broken = log((0, 0), (-0.3, 0.1))
    broken[1]["evals"]["judge"][3] = None
    assert "judge fell by" in stop_reason(settings, broken)
    broken[1]["evals"]["judge"] = [None] * 30
    assert stop_reason(settings, broken) == ""


def test_a_run_stops_when_a_watched_score_rose_above_the_base_models():
    settings = Settings(
        eval_every=1,
        eval_prompts=tuple(f"prompt {k}" for k in range(30)),
        evals=("saturation",),
        drift_stop={"scorer": "saturation", "above": 0.1},
    )
    base = [0.5 + k / 100 for k in range(30)]  # mean 0.645

    def log(shift, noise):
        scores = [value + shift + noise * (-1) ** k for k, value in enumerate(base)]
        named = {"evals": {"saturation": scores}, "base_evals": {"saturation": base}}
        return [{"drift": 0.0, **named}]

    assert stop_reason(settings, log(0, 0)) == stop_reason(settings, log(-0.3, 0)) == ""
    assert stop_reason(settings, log(0.06, 0)) == ""  # 9.3 %
    assert stop_reason(settings, log(0.13, 2)) == ""  # within the noise of the prompts
    found = stop_reason(settings, log(0.129, 0.01))
    assert found == "saturation is 20.0% above the base model's, more than 10.0%"


def test_evaluations_hold_the_base_models_scores(engine, tmp_path):
    """Those of its images of the same prompts and seeds; at update 0 the two are equal."""
    watch = {"eval_every": 2, "eval_prompts": world.PROMPTS, "evals": ["saturation"]}
    watch["drift_stop"] = {"scorer": "saturation", "above": 0.5}
    report = world.tune(engine, tmp_path, updates=2, lr=0.1, **watch)
    first, last = (r for r in report.log if r["kind"] == "eval")
    assert first["evals"] == first["base_evals"] == last["base_evals"] != last["evals"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"evals": ["judge"]}, "eval_every"),
        (
            {
                "evals": ["judge"],
                "drift_stop": {"scorer": "clipped", "above": 0.1},
                "eval_every": 1,
            },
            "fit.drift_stop: 'clipped' is not one of fit.evals",
        ),
        ({"drift_stop": {"scorer": "judge"}, "eval_every": 1}, '"above": NUMBER'),
        ({"evals": ["frechet"], "eval_every": 1}, "measure of sets"),
        ({"evals": ["jugde"], "eval_every": 1}, "did you mean 'judge'"),
        (
            {"evals": ["judge"], "stop": {"scorer": "jugde", "worse_by": 0}, "eval_every": 1},
            "fit.stop: 'jugde' is not one of fit.evals (did you mean 'judge'?)",
        ),
        ({"stop": {"scorer": "judge", "worse_by": -1}, "eval_every": 1}, "stop"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_sampling(engine, tmp_path, values, words):
    with pytest.raises((UsageError, ValueError)) as caught:
        world.tune(engine, tmp_path / "out", **values)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


def test_batches_are_functions_of_seed_update_and_row():
    one = [batch(["a", "b", "c"], 4, u, 5) for u in range(6)]
    assert one == [batch(["a", "b", "c"], 4, u, 5) for u in range(6)]
    order = [p for b in one for p in b.prompts]
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 24, 3))
    assert order[:12] != [*order[:3]] * 4  # each pass has an order of its own
    seeds = [s for b in one for s in b.seeds]
    assert len(set(seeds)) == 24 and all(0 <= s < 2**63 for s in seeds)
    halves = [batch(["a", "b"], 4, 1, 5, rank=r, world=2).rows for r in (0, 1)]
    assert halves == [[0, 2], [1, 3]]
    grouped = batch(["a", "b"], 4, 0, 5, group=2).prompts
    assert grouped[0] == grouped[1] != grouped[2] == grouped[3]


def test_scorers_of_ones_own_are_recorded_by_name(engine, tmp_path):
    """In the configuration and beside the result, so that the run goes on in another process."""

    def level(images, prompts):
        return images.mean((1, 2, 3))

    own = level, registry.build("reward", {"name": "target", "reward": "brightness", "value": 1})
    watch = {"eval_every": 1, "evals": ["saturation", *own]}
    report = world.tune(engine, tmp_path, updates=1, **watch)
    assert report.log[0]["eval_level"] > 0 > report.log[0]["eval_target"]
    spec = {"name": "target", "reward": {"name": "brightness"}, "value": 1.0}
    for path in (tmp_path / "config.json", report.lora / "manifest.json"):
        assert json.loads(path.read_text())["fit"]["evals"] == ["saturation", "level", spec]
    watch["evals"][1] = lambda images, prompts: images.mean((1, 2, 3))
    watch["evals"][1].__name__ = "level"
    assert world.tune(engine, tmp_path, updates=2, **watch).updates == 2


def test_a_tracker_gets_all_numbers(engine, tmp_path, monkeypatch):
    from accelerate import Accelerator

    seen = []
    monkeypatch.setattr("sampler.training.fit.check_tracker", lambda name: None)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name: None)
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: seen.append((step, values)))
    report = world.tune(engine, tmp_path, updates=1, log_with="tensorboard")
    ((step, values),) = seen
    numbers = {k: v for k, v in report.log[0].items() if k not in ("kind", "update")}
    assert step == 1 and values == {f"update/{k}": v for k, v in numbers.items()}
    assert {"update/images", "update/nfe", "update/K"} <= set(values)


def test_the_log_is_always_json(engine, tmp_path):
    world.tune(engine, tmp_path, updates=1)
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(text))


def test_settings_are_strict():
    assert settings_from({"betas": [0.8, 0.9]}).betas == (0.8, 0.9)
    with pytest.raises(UsageError, match="a list of 2 numbers, each at least 0 and below 1"):
        settings_from({"betas": [0.9, 1.0]})
    for bad in ({"batch": 0}, {"micro": 0}, {"mixed_precision": "fp16"}, {"lr": float("nan")}):
        with pytest.raises(sampler.SamplerError):
            settings_from(bad)


@pytest.mark.parametrize(
    ("trainer", "given", "wanted"),
    [
        ("alignprop", {}, (8, 8)),
        ({"name": "grpo"}, {}, (32, 8)),
        ({"name": "nft"}, {"micro": 4}, (32, 4)),
        ({"name": "awm", "group_size": 2}, {}, (8, 8)),
        ({"name": "dpo", "group_size": 3}, {}, (12, 8)),
        ({"name": "nft"}, {"batch": 16}, (16, 16)),
    ],
)
def test_a_batch_has_four_groups_by_default(engine, tmp_path, trainer, given, wanted):
    settings = {"steps": 4, "height": 16, "width": 16, **given}
    spec = world.TRAINERS.get(trainer, trainer) if isinstance(trainer, str) else trainer
    sampler.finetune(engine, spec, "brightness", ["a dog"], tmp_path, 0, settings=settings)
    fit = json.loads((tmp_path / "config.json").read_text())["fit"]
    assert (fit["batch"], fit["micro"]) == wanted


def test_prompts_carry_metadata_to_the_reward(engine, tmp_path):
    """From mappings, CSV and JSON Lines; part of what the run is."""
    (tmp_path / "p.csv").write_text("prompt,meta_count\na dog,2\na cat,\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog", "meta_count": 2}\n{"prompt": "a cat"}\n')
    rows = [{"prompt": "a dog", "meta_count": 2}, "a cat"]
    seen = []

    def reward(images, prompts, metadata):
        seen.append(sorted(zip(prompts, [m.get("count") for m in metadata], strict=True)))
        return images.mean((1, 2, 3))

    for number, prompts in enumerate((rows, tmp_path / "p.csv", str(tmp_path / "p.jsonl"))):
        out = tmp_path / str(number)
        options = {**world.SHORT, "eval_every": 1}
        sampler.finetune(engine, "ddpo", reward, prompts, out, 1, settings=options)
        written = json.loads((out / "config.json").read_text())["prompts"]
        assert written == [{"prompt": "a dog", "count": 2}, "a cat"]
    assert seen == [[("a cat", None), ("a dog", 2)]] * 9
    seen.clear()
    dry_run(engine, "ddpo", reward, rows, world.SHORT)
    sampler.finetune(engine, "ddpo", reward, read_prompts(rows), out, 1, settings=options)
    assert seen == [[("a cat", None), ("a dog", 2)]]  # of the dry run; the other is complete
    options["eval_prompts"] = ("a dog", "a fox")
    sampler.finetune(engine, "ddpo", reward, rows, tmp_path / "other", 0, settings=options)
    assert seen[1:] == [[("a dog", 2), ("a fox", None)]]
    for bad, problem in (
        ([{"text": "a dog"}], "prompt 1: 'text': unknown column"),
        ([{"prompt": "a dog", "steps": 3}], "prompt 1: steps: a prompt line of fine-tuning has"),
        ([3], "prompt 1: a prompt is a text, or a mapping with 'prompt' and 'meta_\\*' entries"),
        ([], "No prompts"),
    ):
        with pytest.raises((ValueError, sampler.SamplerError), match=problem):
            sampler.finetune(engine, "ddpo", reward, bad, tmp_path / "bad")


@pytest.mark.parametrize("trainer", ["ddpo", "nft", "grpo"])
def test_images_are_compared_where_text_and_metadata_are_equal(engine, tmp_path, trainer):
    """A reward may depend on metadata: the same text with other ones is another prompt."""
    rows = [{"prompt": "a dog", "meta_count": count} for count in (1, 200)]

    def reward(images, prompts, metadata):
        return [m["count"] for m in metadata]

    spec = {**world.TRAINERS[trainer], **({"prompts": "vade"} if trainer == "ddpo" else {})}
    options = {**world.SHORT, "batch": 4}
    report = sampler.finetune(engine, spec, reward, rows, tmp_path, 1, settings=options)
    if trainer == "ddpo":
        found = checkpoint.load_newest(tmp_path / "checkpoints")
        assert found is not None
        state = found.state["trainer"]
        assert len(state["own"]) == len(state["hits"]) == 2
        assert sorted(map(set, state["own"].values()), key=max) == [{1.0}, {200.0}]
    else:
        assert report.log[0]["flat_groups"] == 1.0


def test_sigterm_saves_a_checkpoint(engine, tmp_path):
    import os
    import signal

    def reward(images, prompts):
        if len(world.curve(tmp_path / "cut")) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return images.mean((1, 2, 3))

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        world.tune(engine, tmp_path / "cut", "ddpo", reward, updates=5, checkpoint_every=100)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in checkpoint.complete(tmp_path / "cut" / "checkpoints")] == ["000003"]
    plain = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    plain.__name__ = "reward"
    world.tune(engine, tmp_path / "cut", "ddpo", plain, updates=5, checkpoint_every=100)
    world.tune(engine, tmp_path / "whole", "ddpo", plain, updates=5, checkpoint_every=100)
    assert world.curve(tmp_path / "cut") == world.curve(tmp_path / "whole")
