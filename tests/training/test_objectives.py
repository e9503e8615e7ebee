"""Objectives and measures against the outputs of the authors' code (tests/golden/flow_training)."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from sampler_kernels import settle

from sampler import metrics, objectives
from sampler.training.matching.base import Matched
from sampler.training.matching.trainers import AWM
from sampler.types import Level, Prediction

GOLDEN = Path(__file__).parents[1] / "golden" / "flow_training"


def cases(file, *forms):
    """(description, {name: tensor}) of the cases of a file, as parameters."""
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        for k, about in enumerate(json.loads(str(arrays["cases_json"]))):
            if not forms or about["form"] in forms:
                prefix = f"c{k:03d}_"
                found = {n[5:]: torch.from_numpy(arrays[n]) for n in arrays if n.startswith(prefix)}
                yield pytest.param(about, found, id=f"{file}-{k}")


def near(ours, golden, tolerance=1e-9):
    """Relative to the largest value."""
    ours, golden = torch.as_tensor(ours), torch.as_tensor(golden)
    scale = max(1e-300, float(golden.abs().max()))
    assert float((ours - golden).detach().abs().max()) <= tolerance * scale


FORMS = {
    "flow_grpo": {},
    "flow_factory_sum": {"floor": 1e-6},
    "verl_omni": {"unbiased": True},
    "dance_grpo": {"eps": 1e-8, "unbiased": True},
}


@pytest.mark.parametrize(("about", "a"), cases("advantages", *FORMS))
def test_group_advantages(about, a):
    rewards = a["rewards"]
    if "rewards2" in a:
        first, second = about["weights"]
        rewards = first * rewards + second * a["rewards2"]
    found = objectives.group_advantages(
        about["prompts"], rewards.numpy(), std=about["std"], **FORMS[about["form"]]
    )
    near(found, a["advantages"])


@pytest.mark.parametrize(("about", "a"), cases("advantages", "gdpo"))
def test_gdpo_advantages(about, a):
    rewards = [a["rewards"].numpy(), a["rewards2"].numpy()]
    near(objectives.gdpo_advantages(about["prompts"], rewards, about["weights"]), a["advantages"])


@pytest.mark.parametrize(("about", "a"), cases("advantages", "nft_r"))
def test_optimality(about, a):
    """Of tensors, arrays and lists."""
    for given in (a["advantages"], a["advantages"].numpy(), a["advantages"].tolist()):
        found = objectives.optimality(given, about["adv_clip_max"], about["mode"])
        near(found, a["r"], 1e-9 if hasattr(given, "dtype") else 1e-6)


def test_groups_of_unequal_size_and_of_equal_rewards():
    """Every deviation, population and sample; a single image has no advantage, nor have equals."""
    prompts, rewards = ["a", "b", "a", "c", "a", "b", "d", "d"], [1, 5, 2, 7, 6, 9, 0.1, 0.1]
    for std in ("batch", "group", "none"):
        for unbiased in (False, True):
            found = objectives.group_advantages(prompts, rewards, std, 1e-4, unbiased)
            for name in "abcd":
                rows = [k for k, prompt in enumerate(prompts) if prompt == name]
                own = np.array([rewards[k] for k in rows])
                pool = own if std == "group" else np.array(rewards)
                scale = pool.std(ddof=int(unbiased)) + 1e-4 if len(pool) > 1 else 1.0
                wanted = (own - own.mean()) / (1 if std == "none" else scale)
                np.testing.assert_allclose(found[rows], wanted, atol=1e-12)
    assert not objectives.group_advantages(prompts, [0.3] * 8).any()
    assert not objectives.group_advantages(prompts, [0.3] * 8, std="group", floor=1e-6).any()
    weighed = objectives.gdpo_advantages(prompts, [rewards, [0.3] * 8], [1.0, 5.0])
    np.testing.assert_allclose(weighed, objectives.gdpo_advantages(prompts, [rewards], [1.0]))


@pytest.mark.parametrize(("about", "a"), cases("policy_loss", "grpo", "guard", "dppo"))
def test_policy_losses(about, a):
    mean = a["mean"].clone().requires_grad_()
    std, limit = float(a["std"]), about["adv_clip_max"]
    advantage = a["advantages"] if limit is None else a["advantages"].clamp(-limit, limit)

    def log_prob(centre):
        density = -((a["after"] - centre) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
        return density.flatten(1).mean(1)

    log_ratio = log_prob(mean) - log_prob(a["old_mean"])
    if about["form"] == "dppo":
        keep = objectives.dppo_keep(
            mean, a["old_mean"], std, log_ratio, advantage, about["kl_mask_threshold"]
        )
        loss = (-advantage * log_ratio.exp() * keep).mean()
    else:
        dt = 1.0
        if about["form"] == "guard":
            log_ratio = objectives.guarded_log_ratio(mean, a["old_mean"], a["after"], std)
            dt = about["sqrt_dt"] ** 2 if about.get("divide_dt", True) else 1.0
        loss = objectives.clipped_loss(log_ratio, advantage, about["clip"]).mean() / dt
    near(loss, a["loss"])
    near(torch.autograd.grad(loss, mean)[0], a["grad_mean"], 1e-7)


@pytest.mark.parametrize(("about", "a"), cases("policy_loss", "kl_released"))
def test_the_released_kl_is_that_of_the_step_times_its_length(about, a):
    """beta = their beta·|dt|, as the porting guide says: beta·KL is the same term of the loss."""
    kl = objectives.gaussian_kl(a["mean"], a["old_mean"], float(a["std"])).mean()
    near(kl * about["sqrt_dt"] ** 2, a["kl"])


def test_the_guard_is_unbiased_and_the_plain_ratio_is_not():
    """Also its identity: g = (Δ log p + mean(Δμ²)/(2·std²))·std."""
    torch.manual_seed(0)
    old, std = torch.zeros(4000, 8, dtype=torch.float64), 0.5
    mean = old + 0.2
    after = old + std * torch.randn_like(old)
    g = objectives.guarded_log_ratio(mean, old, after, std)
    plain = ((after - old) ** 2 - (after - mean) ** 2).mean(1) / (2 * std**2)
    assert abs(g.mean()) < 4 * g.std() / len(g) ** 0.5
    assert plain.mean() < -4 * plain.std() / len(g) ** 0.5
    near(g, (plain + 0.2**2 / (2 * std**2)) * std)


def flow(x, out, sigma):
    return Prediction.from_velocity(x, out, Level(sigma, 1 - sigma, sigma))


@pytest.mark.parametrize(("about", "a"), cases("forward_rl", "nft"))
def test_nft_loss(about, a):
    """With KL to the reference, mean((v − v_ref)²), as the stored loss has it."""
    t = a["t"].view(-1, 1, 1, 1)
    x = (1 - t) * a["x0"] + t * a["noise"]
    new, beta, limit = a["new"].clone().requires_grad_(), about["beta"], about["adv_clip_max"]
    if "advantages" in a:
        near(objectives.optimality(a["advantages"], limit, about["mode"]), a["r"])
    losses = objectives.nft_loss(x - t * new, x - t * a["old"], a["x0"], a["r"], beta)
    pair = flow(x, new, a["t"]), flow(x, a["old"], a["t"])
    near(objectives.nft_loss(*pair, a["x0"], a["r"], beta), losses)
    if "policy_per_row" in a:
        near(losses, a["policy_per_row"])
    loss = limit * losses.mean() + about["kl_beta"] * ((new - a["ref"]) ** 2).mean()
    near(objectives.velocity_distance(pair[0], flow(x, a["ref"], a["t"])).mean(), a["kl"])
    near(loss, a["loss"])
    near(torch.autograd.grad(loss, new)[0], a["grad"], 1e-7)


def test_nft_has_one_gradient_on_policy_for_every_beta_and_parametrisation():
    """(2r − 1) times the gradient of the denoising error, although the loss itself is constant."""
    torch.manual_seed(1)
    x0, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    sigma = torch.linspace(0.2, 0.8, 5, dtype=torch.float64)
    level, s = Level(sigma, 1 - sigma, sigma), sigma.view(-1, 1, 1, 1)
    x, r = (1 - s) * x0 + s * eps, torch.rand(5, dtype=torch.float64)
    d = (x0 + 0.3 * torch.randn_like(x0)).requires_grad_()
    scale = (d - x0).abs().flatten(1).mean(1).detach()
    wanted = (2 * r - 1) / scale * ((d - x0) ** 2).flatten(1).mean(1)
    wanted = torch.autograd.grad(wanted.sum(), d)[0]
    for beta in (0.1, 1.0):
        loss = objectives.nft_loss(d, d.detach(), x0, r, beta).sum()
        near(torch.autograd.grad(loss, d)[0], wanted)
        near(objectives.nft_loss(d, d, x0, r, beta), objectives.nft_loss(d, d, x0, 1 - r, beta))
    old = d.detach() + 0.1
    base = objectives.nft_loss(d, old, x0, r, 0.5)
    for kind in ("x0", "eps", "velocity"):

        def out(x0_like):
            e = (x - (1 - s) * x0_like) / s
            return {"x0": x0_like, "eps": e, "velocity": e - x0_like}[kind]

        pair = [Prediction.of(kind, x, out(v), level) for v in (d, old)]
        near(objectives.nft_loss(*pair, x0, r, 0.5), base)
        gap = ((d - old) / s).square().flatten(1).mean(1)
        near(objectives.velocity_distance(*pair), gap)


def test_the_branches_of_nft():
    """At beta = 1 the better one is the trained estimate; the weight of the matching is sigma."""
    torch.manual_seed(5)
    x0, eps, v = torch.randn(3, 4, 3, 4, 4, dtype=torch.float64)
    sigma = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    x = (1 - s) * x0 + s * eps
    new, old = x - s * v, x0 + 0.3
    gap, exact = v - (eps - x0), (new - x0).square().flatten(1).mean(1)
    wanted = sigma * gap.square().flatten(1).mean(1) / gap.abs().flatten(1).mean(1)
    ones = torch.ones(4, dtype=torch.float64)
    near(objectives.nft_loss(new, old, x0, ones, 1.0), wanted)
    near(objectives.nft_loss(new, new, x0, ones, 1.0), exact / (new - x0).abs().flatten(1).mean(1))
    worse = 2 * old - new - x0
    worse = worse.square().flatten(1).mean(1) / worse.abs().flatten(1).mean(1)
    near(objectives.nft_loss(new, old, x0, 0 * ones, 1.0), worse)
    near(objectives.nft_loss(x0, x0, x0, ones, 1.0, floor=1e-5), 0 * ones)


@pytest.mark.parametrize(("about", "a"), cases("forward_rl", "awm"))
def test_matching_log_prob(about, a):
    weighting = {"Uniform": "uniform", "t**2": "t2"}.get(about["weighting"], about["weighting"])
    t = a["t"].view(-1, 1, 1, 1)
    x = (1 - t) * a["x0"] + t * a["noise"]
    for out, golden in ((a["new"], a["log_prob"]), (a["old"], a["old_log_prob"])):
        pred = flow(x, out, a["t"])
        near(
            objectives.matching_log_prob(
                pred, a["x0"], a["noise"], weighting, about["ghuber_power"]
            ),
            golden,
        )


@pytest.mark.parametrize(("about", "a"), cases("forward_rl", "awm"))
def test_the_loss_of_awm(about, a):
    """The trainer's own, one level after the other; with KL, and its gradient."""
    times, count, limit = about["T"], about["B"], about["adv_clip_max"]
    trainer = AWM(
        weighting={"Uniform": "uniform", "t**2": "t2"}.get(about["weighting"], about["weighting"]),
        power=about["ghuber_power"],
        average={"exp_first": "each", "sum_first": "levels"}[about["loss_type"]],
        clip_range=about["clip"],
        kl_law=about["kl_weight"].lower(),
        max_advantage=limit,
    )
    advantage = a["advantages"].clamp(-limit, limit)
    if about["advantage_max"] is None:  # the authors' default does not scale them
        advantage = advantage * limit
    new = a["new"].clone().requires_grad_()
    parts = [slice(k * count, (k + 1) * count) for k in range(times)]

    def matched(part, joint=None):
        t = a["t"][part]
        x = (1 - t.view(-1, 1, 1, 1)) * a["x0"][part] + t.view(-1, 1, 1, 1) * a["noise"][part]
        preds = [flow(x, out[part], t) for out in (new, a["old"], a["ref"])]
        return Matched(*preds, a["x0"][part], a["noise"][part], preds[0].level, joint)

    joint = None
    if trainer.joint:
        ratios = [trainer.log_ratio(matched(part)).detach() for part in parts]
        joint = torch.stack(ratios).mean(0)
    policy = kl = 0
    for part in parts:
        one = matched(part, joint)
        policy = policy + trainer.loss(one, advantage)[0].mean() / times
        scale = torch.tensor([trainer.kl_scale(float(t)) for t in a["t"][part]])
        kl = kl + (scale * trainer.pull(one.new, one.base)).mean() / times
    near(policy, a["policy_loss"])
    near(kl, a["kl"], 1e-6)
    loss = policy + about["kl_beta"] * kl
    near(loss, a["loss"])
    near(torch.autograd.grad(loss, new)[0], a["grad"], 1e-7)


@pytest.mark.parametrize(("about", "a"), cases("forward_rl", "dpo"))
def test_dpo_loss(about, a):
    new = a["new"].clone().requires_grad_()
    target = a["noise"] - a["x0"]

    def error(out):
        return ((out - target) ** 2).flatten(1).mean(1).view(-1, 2)

    loss = objectives.dpo_loss(error(new), error(a["ref"]), about["beta"]).mean()
    near(loss, a["loss"])
    near(torch.autograd.grad(loss, new)[0], a["grad"], 1e-7)


@pytest.mark.parametrize(("about", "a"), cases("schedules", "nft_decay"))
def test_old_decay(about, a):
    law = ("on_policy", "slow", "fast")[about["type"]]
    near(np.array([objectives.old_decay(int(s), law) for s in a["step"]]), a["decay"])


@pytest.mark.parametrize(("about", "a"), cases("schedules", "mixgrpo_window"))
def test_sde_window(about, a):
    for update, golden in enumerate(zip(a["first"].tolist(), a["size"].tolist(), strict=True)):
        found = objectives.sde_window(
            update,
            about["group_size"],
            about["max_timesteps"],
            about["iters_per_group"],
            about.get("sample_strategy", "progressive"),
            stride=1 if about.get("prog_overlap") else None,
            roll_back=about.get("roll_back", False),
        )
        assert found == golden, update


def test_a_random_window_is_a_function_of_the_update():
    found = [objectives.sde_window(u, 2, 9, 5, "random") for u in range(200)]
    assert found == [objectives.sde_window(u, 2, 9, 5, "random") for u in range(200)]
    assert {first for first, _ in found} == set(range(8)) and {size for _, size in found} == {2}


@pytest.mark.parametrize(("about", "a"), cases("schedules", "time_logit_normal", "time_uniform"))
def test_matching_times(about, a):
    law, (low, high) = about["form"].removeprefix("time_"), about["range"]
    near(objectives.matching_times(a["u"].numpy(), law, about["shift"], low, high), a["sigma"])


def test_direct_align_is_a_blend_of_the_image_and_the_estimate():
    torch.manual_seed(2)
    image, noise, v = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    a, b = 0.6, 0.35
    d = (1 - a) * image + a * noise - a * v
    w = (a - b) / (a * (1 - b))
    near(objectives.direct_align(v, image, noise, a, b), image + w * (d - image))


@pytest.mark.parametrize(("about", "a"), cases("tdm"))
def test_trajectory_matching(about, a):
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def level(t):
        return Level(t, bars[t.long()].sqrt(), (1 - bars[t.long()]).sqrt())

    mid, now = level(a["t_mid"]), level(a["t"])
    near(objectives.renoised(a["x_mid"], mid, now, a["rand_noise"]), a["noisy"])
    mixed = objectives.mixed_noise(a["model_eps"], a["rand_noise"], mid, now)
    near(mixed, a["mixed_noise"])
    fake = a["fake"].clone().requires_grad_()
    loss = objectives.fake_score_loss(fake, a["model"], now, mixed, a["rand_noise"]).mean()
    near(loss, a["score_loss"])
    near(torch.autograd.grad(loss, fake)[0], a["grad_fake"], 1e-7)
    model = a["model"].clone().requires_grad_()
    guided = a["teacher_uncond"] + about["cfg"] * (a["teacher_cond"] - a["teacher_uncond"])
    huber = about["huber_c"] if about["huber"] else None
    loss = objectives.student_loss(model, guided, a["fake"], huber).mean()
    near(loss, a["student_loss"])
    near(torch.autograd.grad(loss, model)[0], a["grad_model"], 1e-7)


@pytest.mark.parametrize(("about", "a"), cases("evaluation", "geneval"))
def test_geneval(about, a):
    found = objectives.geneval_correct(about["boxes"], about["colours"], about["metadata"])
    assert found == about["correct"]


@pytest.mark.parametrize(("about", "a"), cases("evaluation", "dpg"))
def test_questions_are_scored_alike_in_any_order(about, a):
    """Equal to the released score where its file order is a topological one."""
    order, parents = about["order"], about["parents"]
    score = objectives.score_questions(order, parents, about["answers"])
    for other in list(permutations(range(len(order))))[:: max(1, len(order) ** 2)]:
        answers = [[crop[i] for i in other] for crop in about["answers"]]
        again = objectives.score_questions([order[i] for i in other], parents, answers)
        assert again == pytest.approx(score, abs=1e-12)
    assert objectives.score_questions(order, parents, np.array(about["answers"])) == score
    place = {question: k for k, question in enumerate(order)}
    if all(place[p] < place[int(q)] for q, above in parents.items() for p in above if p):
        assert score == pytest.approx(about["score"], abs=1e-12)
    else:
        assert score <= about["score"]


def test_the_tree_has_any_depth_and_every_parent_counts():
    """An answer counts where all ancestors are yes, whatever lies between."""
    parents = {1: [0], 2: [1], 3: [2], 4: [3, 1], 5: [0]}
    for no, wanted in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (None, 5)):
        for order in permutations(range(1, 6)):
            answers = [float(question != no) for question in order]
            found = objectives.score_questions(order, parents, answers)
            assert found == pytest.approx(wanted / 5, abs=1e-12)
    with pytest.raises(ValueError, match="the parent 9 is not among the questions"):
        objectives.score_questions([1, 2], {1: [0], 2: [9]}, [1, 1])


def test_a_cycle_of_questions_is_refused():
    with pytest.raises(ValueError, match="depends on itself"):
        objectives.score_questions([1, 2], {1: [2], 2: [1]}, [1, 1])


@pytest.mark.parametrize(("order", "answers"), [([], []), ([1, 1], [1, 0]), ([1, 2], [1])])
def test_questions_without_an_answer_each_are_refused(order, answers):
    with pytest.raises(ValueError, match="needs different questions, at least one, with an answer"):
        objectives.score_questions(order, {}, answers)


@pytest.mark.parametrize("position", [["left of", 1], ["left of", -1], ["left-of", 0]])
def test_positions_are_relations_to_earlier_objects(position):
    boxes = {"a": [[0, 0, 1, 1, 1]], "b": [[4, 0, 5, 1, 1]]}
    first, second = {"class": "b", "count": 1}, {"class": "a", "count": 1}
    for function in (objectives.geneval_correct, objectives.geneval_share):
        right = [first, {**second, "position": ["left of", 0]}]
        assert function(boxes, {}, {"include": right}) == 1
        wrong = [first, {**second, "position": position}]
        with pytest.raises(ValueError, match="the index of an earlier object"):
            function(boxes, {}, {"include": wrong})


@pytest.mark.parametrize(("about", "a"), cases("evaluation", "features"))
def test_distances_and_diversity(about, a):
    near(metrics.frechet_distance(a["a"], a["b"]), a["frechet"], 1e-6)
    near(metrics.kernel_distance(a["a"], a["b"]), a["kid"], 1e-6)
    near(metrics.vendi_score(a["a"]), a["vendi"], 1e-6)
    assert metrics.frechet_distance(a["a"], a["a"]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="n, m >= 2"):
        metrics.frechet_distance(a["a"][:1], a["b"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: objectives.group_advantages(["a"], [1.0], std="all"), "batch, group, none"),
        (lambda: objectives.group_advantages(["a"], [1.0, 2.0]), "one reward per prompt"),
        (lambda: objectives.gdpo_advantages(["a"], [[1.0]], [1, 2]), "1 rewards, 2 weights"),
        (lambda: objectives.optimality(torch.zeros(1), 5, "some"), "positive_only"),
        (lambda: objectives.old_decay(3, "quick"), "on_policy, slow, fast"),
        (lambda: objectives.matching_times([0.5], "normal"), "uniform, logit_normal"),
        (lambda: objectives.sde_window(1, 2, 9, 3, "steady"), "exp_decay, random"),
        (lambda: objectives.sde_window(1, 5, 4, 3, "random"), "size = 5 must lie in 1..4"),
        (lambda: objectives.sde_window(1, 5, 4, 3), "size = 5 must lie in 1..4"),
    ],
)
def test_wrong_arguments_name_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_settled_predictions_are_tensors():
    x = torch.randn(2, 3)
    assert isinstance(settle(flow(x, x, torch.full((2,), 0.5)).x0), torch.Tensor)
