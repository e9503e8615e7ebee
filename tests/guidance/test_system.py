"""Laws across all rules: counts, batches, state, spaces, an exact test-bed, refusals."""

import math
import warnings

import pytest
import torch

import sampler
from sampler.guidance.linear_ag_coefficients import Coefficients, gram_of, solve
from sampler.guidance.spaces import cosine
from sampler.types import Cond, Level, Lin, Prediction, Span
from tests.analytic import Mixture, flow_grid, mixture, pair_cond, pair_denoiser, vp_grid

SHAPE = (2, 2, 2)
STEPS = 10
MAIN, PLAIN, WEAK = (mixture(8, seed, spread=s) for seed, s in ((1, 1.5), (2, 1.0), (3, 1.2)))
CFG = {"name": "cfg", "scale": 4.0}
THRESHOLD = 0.9945  # which the cosines of this world cross at steps of their own, row by row


def noise(rows, seed=7, dtype=torch.float64):
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Spy:
    """Counts calls and rows per network; conditions are numbers: 1 cond, 0 uncond, 2+k class k."""

    def __init__(self, prediction="eps"):
        self.calls, self.rows = [], []
        self.conditions = {"main": [], "weak": []}
        mixtures = [PLAIN, MAIN, *(mixture(8, 20 + k) for k in range(3))]

        def network(name, worlds):
            def fn(x, level, which):
                self.calls.append(name)
                self.rows.append(x.shape[0])
                self.conditions[name].append(which.clone())
                outs = torch.stack([w.out(x, level, prediction) for w in worlds])
                return outs[which.long(), torch.arange(x.shape[0])]

            return fn

        weak = [WEAK] * len(mixtures)
        self.denoiser = sampler.denoiser(
            network("main", mixtures), prediction, {"weak": network("weak", weak)}
        )


def classify(x0):
    """Logits of three classes, from the distance to fixed points."""
    points = torch.stack([mixture(8, 20 + k).mu[0] for k in range(3)]).to(x0)
    return -((x0.flatten(1)[:, None] - points) ** 2).sum(2) / 20


def conditions(rows):
    extra = {"target": torch.arange(rows) % 3, "classes": torch.arange(2.0, 5.0)}
    return Cond(torch.ones(rows), torch.zeros(rows), extra)


def coefficients(levels):
    """LinearAG fitted on this world's own CFG runs over these levels."""
    history = ([], [])
    spy = Spy()
    engine = sampler.Engine(spy.denoiser)
    rule = sampler.build("guidance", CFG)
    first, grid = engine.start(noise(32, 3), levels, conditions(32), "ddim", rule)
    for snap in [first, *engine.steps(first, grid, conditions(32), "ddim", rule)][:-1]:
        for past, world in zip(history, (MAIN, PLAIN), strict=True):
            past.append(world.out(snap.x, grid[snap.index], "eps"))
    return solve(gram_of(*history), {"scale": 4.0, "prediction": "eps"})


LEVELS = vp_grid(STEPS)
FITTED = coefficients(LEVELS)
RULES = {
    "none": "none",
    "cfg": CFG,
    "cfg rescaled": {**CFG, "rescale": 0.7},
    "cfg 0": {**CFG, "scale": 0.0},
    "cfg 1": {**CFG, "scale": 1.0},
    "apg": {"name": "apg", "scale": 6.0, "momentum": -0.5, "norm_threshold": 15.0},
    "apg weak": {"name": "apg", "scale": 3.0, "against": "weak", "momentum": -0.5},
    "autoguidance": "autoguidance",
    "cfg_zero": {"name": "cfg_zero", "zero_init_steps": 0},
    "linear_ag": {
        "name": "linear_ag",
        "coefficients": FITTED,
        "policy": [1, 1, 1, 0, 1, 0, 1, 0, 0, 0],
    },
    "gfcg": {"name": "gfcg", "classifier": classify, "interval": None},
    "gfcg weak": {"name": "gfcg", "classifier": classify, "network": "weak", "interval": None},
    "classifier": {"name": "classifier", "classifier": classify},
    "three-way": {"name": "sum", "rules": [CFG, "autoguidance"]},
    "gfcg + cfg": {
        "name": "sum",
        "rules": [{"name": "gfcg", "classifier": classify, "interval": None}, CFG],
    },
    "adaptive + autoguidance": {
        "name": "sum",
        "rules": [{"name": "adaptive", "rule": CFG, "threshold": THRESHOLD}, "autoguidance"],
    },
}
for lag in (0, 1):
    for after in ("drop", "hold"):
        for compact in ("rows", "batch"):
            RULES[f"adaptive {lag} {after} {compact}"] = {
                "name": "adaptive",
                "rule": CFG,
                "threshold": THRESHOLD,
                "lag": lag,
                "after": after,
                "compact": compact,
            }
RULES["adaptive apg"] = {"name": "adaptive", "rule": RULES["apg"], "threshold": THRESHOLD}
RULES["adaptive turn"] = {**RULES["adaptive 0 hold rows"], "turn": 0.99, "refresh": 4}
RULES["adaptive linear_ag"] = {
    "name": "adaptive",
    "rule": RULES["linear_ag"],
    "threshold": THRESHOLD,
}
GATED = ("cfg", "apg", "autoguidance", "cfg_zero", "gfcg", "classifier")


def run(rule, rows=3, spy=None, x=None, levels=LEVELS, seed=7):
    """(final snapshot, spy) of a run, with the bare rule of RULES or a spec."""
    spy = spy or Spy()
    engine = sampler.Engine(spy.denoiser)
    built = sampler.build("guidance", rule)
    x = noise(rows, seed) if x is None else x
    cond = conditions(x.shape[0])
    first, grid = engine.start(x, levels, cond, "ddim", built)
    *_, last = engine.steps(first, grid, cond, "ddim", built)
    return last, spy


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_reported_rows_are_the_counted_rows(name, rows):
    last, spy = run(RULES[name], rows)
    assert sum(last.nfe) == sum(spy.rows) and len(last.nfe) == rows
    assert len(spy.calls) <= STEPS * len(set(spy.calls))


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("gate", [{"interval": [0.5, 3.0]}, {"window": [2, 6]}])
def test_outside_its_gate_a_rule_pays_for_one_pass(name, gate):
    spec = RULES[name] if isinstance(RULES[name], dict) else {"name": RULES[name]}
    last, spy = run({**spec, **gate}, 2)
    on = sum(
        0.5 < level.sigma / level.alpha <= 3.0 if "interval" in gate else 2 <= i < 6
        for i, level in enumerate(LEVELS[:-1])
    )
    assert 0 < on < STEPS
    per_step = 0 if name == "classifier" else 1
    late = 1 if name == "gfcg" and "window" in gate else 0  # needs a judgement of the step before
    assert sum(spy.rows) == sum(last.nfe)
    if name != "gfcg":
        assert last.nfe == (STEPS + on * per_step,) * 2
    else:
        assert max(last.nfe) <= STEPS + on - late + 1


@pytest.mark.parametrize("scale", ["cfg", "apg", "autoguidance", "cfg_zero"])
def test_scale_one_is_one_pass_and_the_same_bits(scale):
    plain, _ = run("none")
    last, spy = run({"name": scale, "scale": 1.0})
    assert torch.equal(last.x, plain.x) and last.nfe == (STEPS,) * 3 and "weak" not in spy.calls


@pytest.mark.parametrize("name", RULES)
def test_a_row_alone_is_the_row_of_a_batch(name):
    together, _ = run(RULES[name], 4)
    for row in range(4):
        spy = Spy()
        engine = sampler.Engine(spy.denoiser)
        cond = conditions(4)
        extra = {**cond.extra, "target": cond.extra["target"][row : row + 1]}
        alone = Cond(cond.cond[:1], cond.uncond[:1], extra)
        x = noise(4)[row : row + 1]
        rule = sampler.build("guidance", RULES[name])
        first, grid = engine.start(x, LEVELS, alone, "ddim", rule)
        *_, last = engine.steps(first, grid, alone, "ddim", rule)
        assert torch.equal(last.x[0], together.x[row]), (name, row)
        if "batch" not in name:
            assert last.nfe[0] == together.nfe[row]


@pytest.mark.parametrize("name", RULES)
def test_no_state_survives_a_run(name):
    rule = sampler.build("guidance", RULES[name])
    first, _ = run(rule, 2)
    run(rule, 3, seed=9)
    again, _ = run(rule, 2)
    assert torch.equal(first.x, again.x) and first.nfe == again.nfe


@pytest.mark.parametrize("name", [n for n in RULES if "linear_ag" not in n])
def test_runs_that_start_in_the_middle(name):
    later, spy = run(RULES[name], 2, levels=LEVELS[4:])
    assert later.x.isfinite().all() and sum(spy.rows) == sum(later.nfe)
    assert max(later.nfe) <= 3 * (STEPS - 4)


def test_the_compaction_changes_no_image_and_makes_the_batch_cheaper():
    for lag in (0, 1):
        for after in ("drop", "hold"):
            one, _ = run(RULES[f"adaptive {lag} {after} rows"], 6)
            all_, _ = run(RULES[f"adaptive {lag} {after} batch"], 6)
            assert torch.equal(one.x, all_.x)
            assert sum(one.nfe) <= sum(all_.nfe)
    full, _ = run(CFG, 6)
    dropped, _ = run(RULES["adaptive 0 drop rows"], 6)
    assert sum(dropped.nfe) < sum(full.nfe)
    assert len(set(dropped.nfe)) > 1  # rows converge at steps of their own


def test_holding_keeps_the_run_closer_to_full_guidance_than_dropping():
    full, _ = run(CFG, 16)
    gaps = {}
    for after in ("drop", "hold"):
        rule = {
            "name": "adaptive",
            "rule": CFG,
            "threshold": THRESHOLD,
            "after": after,
            "refresh": 3,
        }
        last, _ = run(rule, 16)
        gaps[after] = float((last.x - full.x).norm())
    assert gaps["hold"] < 0.7 * gaps["drop"]


def steps_of(rule, cosines, kind="eps"):
    """Steps that evaluate u, for one row whose cosines are given."""
    rule = sampler.build("guidance", {"name": "adaptive", **rule})
    state, asked = rule.start(Cond()), []
    for t, gamma in enumerate(cosines):
        c = torch.tensor([[1.0, 0.0]])
        u = torch.tensor([[gamma, math.sqrt(max(0.0, 1 - gamma**2))]])
        level = Level(t, 0.6, 0.8)
        at = Span(t, level, level)
        asked.append("uncond" in rule.plan(c, at, Cond(1, 0), state))
        preds = {"cond": Prediction.of(kind, c * 0, c, level)}
        if asked[-1]:
            preds["uncond"] = Prediction.of(kind, c * 0, u, level)
        _, state = rule.combine(c * 0, preds, at, state)
        state = sampler.settle(state)
    return "".join("10"[not a] for a in asked)


def test_when_adaptive_guidance_evaluates():
    rising = [0.5, 0.9, 0.95, 0.995, 0.999, 0.999, 0.999, 0.999, 0.999]
    assert steps_of({}, rising) == "111100000"
    assert steps_of({"lag": 1}, rising) == "111110000"
    assert steps_of({"refresh": 2}, rising) == "111101010"
    assert steps_of({"after": "hold"}, rising) == "111100100"
    assert steps_of({"after": "hold", "refresh": 0}, rising) == "111100000"
    assert steps_of({"threshold": 1.0}, rising) == "111111111"
    # the latch survives a later dip
    assert steps_of({}, [0.5, 0.995, 0.2, 0.2, 0.2]) == "11000"
    # networks that predict v start near 1 for another reason: they latch when they come back
    falling = [1.0, 0.999, 0.98, 0.995, 0.999]
    assert steps_of({}, falling, "v") == "11110"
    assert steps_of({}, falling, "eps") == "10000"


def test_a_turned_direction_is_refreshed_at_once():
    cosines = [0.5, 0.995, 0.995, 0.995, 0.995, -0.9, 0.995]
    rule = {"after": "hold", "refresh": 3}
    assert steps_of(rule, cosines) == "1100100"
    # from 0.5 to 0.995 the direction turns by acos(0.89), from 0.995 to −0.9 by more
    assert steps_of({**rule, "turn": 0.5}, cosines) == "1100100"
    assert steps_of({**rule, "turn": 0.95}, cosines) == "1110011"
    assert steps_of({**rule, "turn": 0.95, "lag": 1}, cosines) == "1111001"


def test_zero_vectors_have_cosine_zero():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert cosine(Lin.of(zero), Lin.of(one)).tolist() == [0.0]
    assert cosine(Lin.of(zero), Lin.of(zero)).tolist() == [0.0]
    assert abs(cosine(Lin.of(one), Lin.of(one)).item() - 1) < 1e-6


def test_apg_follows_its_paper_where_diffusers_default_does_not():
    """With a strong clip the paper's form goes to c; diffusers' default form goes to u."""
    c, u = noise(2, 1), noise(2, 2)
    x, level = torch.zeros_like(c), Level(0, 0.6, 0.8)
    preds = {k: Prediction.of("eps", x, v, level) for k, v in (("cond", c), ("uncond", u))}
    at = Span(0, level, level)
    ends = {}
    for formulation in ("paper", "diffusers"):
        fields = {"norm_threshold": 1e-3, "space": "native", "formulation": formulation}
        rule = sampler.build("guidance", {"name": "apg", **fields})
        ends[formulation] = rule.combine(x, preds, at, None)[0].out.tensor()
    assert (ends["paper"] - c).norm() < 1e-2 * c.norm()
    assert (ends["diffusers"] - u).norm() < 1e-2 * u.norm()


@pytest.mark.parametrize(
    "momentum, clip, eta", [(None, 0.0, 1.0), (-0.5, 2.0, 0.0), (0.3, 5.0, 0.4)]
)
@pytest.mark.parametrize("original", [True, False])
def test_apg_against_diffusers_own_function(momentum, clip, eta, original):
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    buffer = None if momentum is None else MomentumBuffer(momentum)
    fields = {
        "scale": 6.0,
        "momentum": momentum or 0.0,
        "norm_threshold": clip,
        "eta": eta,
        "space": "native",
        "formulation": "paper" if original else "diffusers",
    }
    rule = sampler.build("guidance", {"name": "apg", **fields})
    state, level = rule.start(Cond()), Level(0, 0.6, 0.8)
    for t in range(5):
        c, u = noise(3, 10 + t, torch.float32), noise(3, 40 + t, torch.float32)
        scale = 5.0 if original else 6.0  # their original formulation counts from 0
        theirs = normalized_guidance(c, u, scale, buffer, eta, clip, original)
        preds = {k: Prediction.of("eps", c * 0, v, level) for k, v in (("cond", c), ("uncond", u))}
        ours, state = rule.combine(c * 0, preds, Span(t, level, level), state)
        ours, state = sampler.settle((ours.out, state))
        assert (ours - theirs).norm() / theirs.norm() < 1e-6


def test_cfg_zero_and_rescale_against_diffusers_own_functions():
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    c, u = noise(3, 1, torch.float32), noise(3, 2, torch.float32)
    level = Level(0, 0.4, 0.6)
    preds = {k: Prediction.of("velocity", c * 0, v, level) for k, v in (("cond", c), ("uncond", u))}
    at = Span(0, level, level)
    alpha = cfg_zero_star_scale(c.flatten(1), u.flatten(1)).view(-1, 1, 1, 1)
    theirs = alpha * u + 4 * (c - alpha * u)
    rule = sampler.build("guidance", {"name": "cfg_zero", "scale": 4.0, "zero_init_steps": 0})
    assert (rule.combine(c, preds, at, ())[0].out.tensor() - theirs).norm() / theirs.norm() < 1e-6
    theirs = rescale_noise_cfg(u + 4 * (c - u), c, 0.7)
    rule = sampler.build("guidance", {**CFG, "rescale": 0.7})
    assert (rule.combine(c, preds, at, ())[0].out.tensor() - theirs).norm() / theirs.norm() < 1e-6


def test_nothing_is_nan_on_zeros_and_constants():
    zero = torch.zeros(2, *SHAPE)
    for value in (zero, zero + 1):
        for kind, spec in (
            ("eps", {**CFG, "rescale": 0.7}),
            ("velocity", {"name": "cfg_zero", "zero_init_steps": 0}),
            ("eps", {"name": "apg"}),
            ("eps", {"name": "adaptive"}),
            ("eps", {**CFG, "match_norm": [-1]}),
        ):
            rule = sampler.build("guidance", spec)
            level = Level(0, 0.6, 0.4)
            preds = {k: Prediction.of(kind, zero, value, level) for k in ("cond", "uncond")}
            out, _ = rule.combine(zero, preds, Span(0, level, level), rule.start(Cond()))
            assert torch.equal(out.x0.tensor(), preds["cond"].x0.tensor())


def test_rescale_one_gives_the_std_of_c():
    c, u = noise(3, 1), noise(3, 2)
    level = Level(0, 0.6, 0.8)
    preds = {k: Prediction.of("eps", c, v, level) for k, v in (("cond", c), ("uncond", u))}
    rule = sampler.build("guidance", {**CFG, "rescale": 1.0})
    out = rule.combine(c, preds, Span(0, level, level), ())[0].out.tensor()
    assert torch.allclose(out.flatten(1).std(1), c.flatten(1).std(1), rtol=1e-6)


def test_apg_update_is_orthogonal_and_bounded():
    c, u = noise(4, 1, torch.float32), noise(4, 2, torch.float32)
    level = Level(0, 0.6, 0.8)
    preds = {k: Prediction.of("x0", c, v, level) for k, v in (("cond", c), ("uncond", u))}
    rule = sampler.build("guidance", {"name": "apg", "scale": 9.0, "norm_threshold": 1.5})
    update = rule.combine(c, preds, Span(0, level, level), None)[0].x0.tensor() - c
    norms = update.flatten(1).norm(dim=1)
    along = (update * c).flatten(1).sum(1) / (norms * c.flatten(1).norm(dim=1))
    assert along.abs().max() <= 1e-5
    assert (norms <= 8 * 1.5 * (1 + 1e-6)).all()
    relative = sampler.build("guidance", {"name": "apg", "scale": 9.0, "r_rel": 1.5 / 8**0.5})
    same = relative.combine(c, preds, Span(0, level, level), None)[0].x0.tensor() - c
    assert torch.allclose(same, update, atol=1e-6)


@pytest.mark.parametrize("name", ["cfg", "apg", "autoguidance", "three-way", "apg native"])
def test_the_parametrisation_of_the_network_does_not_matter(name):
    spec = {**RULES["apg"], "space": "native"} if name == "apg native" else RULES[name]
    finals = [run(spec, 4, Spy(kind))[0].x for kind in ("eps", "v", "x0")]
    gaps = [float((x - finals[0]).abs().max() / finals[0].abs().max()) for x in finals[1:]]
    if name == "apg native":  # the space matters to norms and projections
        assert min(gaps) > 1e-3
    else:
        assert max(gaps) < 1e-5


def test_zero_init_costs_nothing_and_stands_still():
    spy = Spy("velocity")
    engine = sampler.Engine(spy.denoiser)
    levels, cond = flow_grid(6), conditions(2)
    rule = sampler.build("guidance", {"name": "cfg_zero", "scale": 3.0, "zero_init_steps": 2})
    x = noise(2)
    first, grid = engine.start(x, levels, cond, "ddim", rule)
    snaps = list(engine.steps(first, grid, cond, "ddim", rule))
    assert torch.allclose(snaps[1].x, x, atol=1e-12) and not torch.allclose(snaps[2].x, x)
    assert snaps[-1].nfe == (8, 8) and snaps[1].nfe == (0, 0)


def test_gfcg_judges_without_gradients_and_pays_only_where_it_is_confused():
    weight = torch.nn.Parameter(torch.eye(8, dtype=torch.float64)[:3] * 3)
    seen = []

    def classifier(x0):
        seen.append(torch.is_grad_enabled())
        return x0.flatten(1) @ weight.T

    rule = {"name": "gfcg", "classifier": classifier, "interval": None}
    last, spy = run(rule, 4)
    assert not any(seen) and weight.grad is None and last.x.grad_fn is None
    assert STEPS <= min(last.nfe) and max(last.nfe) <= 2 * STEPS - 1
    sure = {**rule, "classifier": lambda x0: torch.eye(3)[torch.arange(4) % 3] * 100}
    last, spy = run(sure, 4)
    assert last.nfe == (STEPS,) * 4
    weak, spy = run({**rule, "network": "weak"}, 4)
    assert spy.calls.count("main") == STEPS  # the weak pass is Autoguidance's own: none is added
    asked = torch.cat(spy.conditions["weak"])
    assert set(asked.tolist()) <= {2.0, 3.0, 4.0}


def test_the_weak_network_gets_the_same_conditions():
    _, spy = run("autoguidance", 3)
    for main, weak in zip(spy.conditions["main"], spy.conditions["weak"], strict=True):
        assert torch.equal(main, weak)


def test_classifier_guidance_samples_the_posterior_of_a_mixture():
    """With the exact classifier of noisy samples, s = 1 is Bayes' rule: p(x|y) of a mixture."""
    world = Mixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [2.0]]), torch.tensor([0.5] * 2)
    )
    part = Mixture(torch.ones(1), torch.tensor([[2.0]]), torch.tensor([0.5]))

    def posterior(x, level):
        var = (level.alpha * world.sd) ** 2 + level.sigma**2
        return world.w.log() - (x - level.alpha * world.mu[:, 0]) ** 2 / (2 * var) - var.log() / 2

    engine = sampler.Engine(
        sampler.denoiser(lambda x, level, which: world.eps(x, level).to(x.dtype), "eps")
    )
    exact = sampler.Engine(
        sampler.denoiser(lambda x, level, which: part.eps(x, level).to(x.dtype), "eps")
    )
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = Cond(extra={"target": torch.ones(200, dtype=torch.long)})
    rule = {"name": "classifier", "classifier": posterior, "at": "x", "strength": 1.0}
    guided = engine.run(x, vp_grid(100), cond, "ddim", rule)
    expected = exact.run(x, vp_grid(100), None, "ddim", "none")
    assert (guided - expected).abs().max() < 1e-3
    assert (engine.run(x, vp_grid(100), cond, "ddim", "none") < 0).double().mean() > 0.4


def test_the_exact_world():
    """CFG sharpens, APG updates less than CFG, Autoguidance removes outliers."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2, generator=g, dtype=torch.float64)
    cond_world = Mixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64),
        torch.tensor([0.3, 0.3], dtype=torch.float64),
    )
    everything = Mixture(
        torch.full((4,), 0.25, dtype=torch.float64),
        torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]], dtype=torch.float64),
        torch.full((4,), 0.3, dtype=torch.float64),
    )
    levels, cond = vp_grid(40), pair_cond(256)
    engine = sampler.Engine(pair_denoiser(cond_world, everything))

    def final(rule, steps=levels):
        return engine.run(x, steps, cond, "ddim", rule)

    def spread(points):
        return torch.cdist(points, cond_world.mu).amin(1).std()

    assert spread(final({"name": "cfg", "scale": 4.0})) < 0.95 * spread(final("none"))
    at = Span(0, levels[10], levels[11])
    preds = {
        k: Prediction.of("eps", x, w.eps(x, at.now), at.now)
        for k, w in (("cond", cond_world), ("uncond", everything))
    }
    norms = {}
    for name, fields in (("cfg", {}), ("apg", {"norm_threshold": 0.0, "momentum": 0.0})):
        rule = sampler.build("guidance", {"name": name, "scale": 4.0, **fields})
        norms[name] = (rule.combine(x, preds, at, None)[0].x0 - preds["cond"].x0).tensor().norm()
    assert norms["apg"] < norms["cfg"]
    rough = Mixture(cond_world.w, cond_world.mu, torch.tensor([0.5, 0.5], dtype=torch.float64))
    sharp = Mixture(cond_world.w, cond_world.mu, torch.tensor([0.35, 0.35], dtype=torch.float64))
    auto = sampler.Engine(
        sampler.denoiser(
            lambda x, level, c: sharp.eps(x, level),
            "eps",
            {"weak": lambda x, level, c: rough.eps(x, level)},
        )
    )

    def outliers(rule):
        points = auto.run(x, levels, torch.zeros(256), "ddim", rule)
        return (torch.cdist(points, cond_world.mu).amin(1) > 0.7).double().mean()

    assert outliers({"name": "autoguidance", "scale": 2.0}) < 0.5 * outliers("none")


def test_gfcg_raises_the_posterior_of_the_class_that_was_asked_for():
    """Three overlapping classes; accuracy is the exact posterior's of the drawn class."""
    centres = torch.tensor([[1.2, 0.0], [-0.6, 1.0], [-0.6, -1.0]], dtype=torch.float64)
    worlds = [
        Mixture(torch.ones(1).double(), centres[k : k + 1], torch.ones(1).double() * 0.8)
        for k in range(3)
    ]

    def fn(x, level, which):
        outs = torch.stack([w.eps(x, level) for w in worlds])
        return outs[which.long(), torch.arange(x.shape[0])]

    def posterior(x0):
        return -((x0[:, None] - centres) ** 2).sum(2) / (2 * 0.64)

    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.arange(300) % 3
    cond = Cond(cond=target, extra={"target": target, "classes": torch.arange(3)})
    engine = sampler.Engine(sampler.denoiser(fn, "eps"))

    def accuracy(rule):
        final = engine.run(x, vp_grid(20), cond, "ddim", rule)
        return (posterior(final).argmax(1) == target).double().mean()

    rule = {"name": "gfcg", "classifier": posterior, "strength": 3.0}
    assert accuracy(rule) > accuracy("none") + 0.05


def test_half_precision_networks_lose_only_their_rounding():
    c, u = noise(3, 1), noise(3, 2)
    level = Level(0, 0.6, 0.8)
    at = Span(0, level, level)
    for spec in (CFG, RULES["apg"], {"name": "cfg_zero", "zero_init_steps": 0}):
        rule = sampler.build("guidance", spec)
        for dtype in (torch.bfloat16, torch.float16):
            outs = []
            for kept in (torch.float64, torch.float32, dtype):
                preds = {
                    k: Prediction.of("eps", c.to(dtype).to(kept), v.to(dtype).to(kept), level)
                    for k, v in (("cond", c), ("uncond", u))
                }
                outs.append(rule.combine(c, preds, at, rule.start(Cond()))[0].eps.tensor())
            exact, single, half = (o.double() for o in outs)
            assert (single - exact).norm() / exact.norm() < 1e-6
            assert torch.equal(single, half)


BAD = {
    "momentum": ({"name": "apg", "momentum": 1.5}, "momentum = 1.5 must be a number from -1 to 1"),
    "clip": ({"name": "apg", "norm_threshold": -1.0}, "norm_threshold = -1.0"),
    "two clips": ({"name": "apg", "norm_threshold": 15, "r_rel": 0.05}, "both set the clip"),
    "axes": ({"name": "apg", "axes": [0]}, "axes"),
    "space": ({"name": "apg", "space": "pixels"}, "space"),
    "scale": ({"name": "cfg", "scale": -1.0}, "scale = -1.0"),
    "nan": ({"name": "autoguidance", "scale": float("nan")}, "scale"),
    "rescale": ({"name": "cfg", "rescale": 2.0}, "rescale = 2.0"),
    "interval": ({"name": "cfg", "interval": [3.0, 1.0]}, "interval"),
    "window": ({"name": "apg", "window": [5, 2]}, "window"),
    "threshold": ({"name": "adaptive", "threshold": 1.2}, "threshold = 1.2"),
    "lag": ({"name": "adaptive", "lag": 2}, "lag"),
    "turn": ({"name": "adaptive", "turn": 0.9}, "set refresh"),
    "field": ({"name": "adaptive", "tresh": 1}, "threshold"),
    "adaptive weak": ({"name": "adaptive", "rule": "autoguidance"}, "rule = 'autoguidance'"),
    "adaptive twice": ({"name": "adaptive", "rule": "adaptive"}, "rule = 'adaptive'"),
    "zero + apg": (
        {"name": "sum", "rules": [{"name": "cfg_zero", "zero_init_steps": 0}, "apg"]},
        "'cfg_zero' and 'apg' both rewrite",
    ),
    "cfg twice": ({"name": "sum", "rules": ["cfg", "cfg"]}, "both rewrite"),
    "zero start in a sum": ({"name": "sum", "rules": ["cfg_zero", "autoguidance"]}, "zero start"),
    "one": ({"name": "sum", "rules": ["cfg"]}, "at least two"),
    "hold linear_ag": (
        {"name": "adaptive", "rule": RULES["linear_ag"], "after": "hold"},
        "use one of the two",
    ),
    "policy": ({**RULES["linear_ag"], "policy": [1, 0]}, "each of the 10 steps"),
    "policy values": ({**RULES["linear_ag"], "policy": [2] * 10}, "policy"),
    "linear_ag scale": ({**RULES["linear_ag"], "scale": 9.0}, "fitted for scale = 4.0"),
    "zero steps": ({"name": "cfg_zero", "zero_init_steps": -1}, "zero_init_steps"),
    "gfcg strength": ({"name": "gfcg", "strength": -2.0}, "strength"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_when_they_are_built(name):
    spec, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        sampler.build("guidance", spec)


def test_bad_runs_are_refused_before_any_network_call():
    spy = Spy()
    engine = sampler.Engine(spy.denoiser)
    plain = sampler.Engine(pair_denoiser(MAIN, PLAIN))
    x, extra = noise(2), conditions(2).extra
    for rule, cond, words in (
        (CFG, torch.ones(2), "unconditional branch"),
        ("apg", torch.ones(2), "unconditional branch"),
        ("cfg_zero", conditions(2), "not a flow model"),
        ("gfcg", conditions(2), "classifier is needed"),
        ({"name": "gfcg", "classifier": classify}, Cond(torch.ones(2)), "lack classes and target"),
        ("classifier", conditions(2), "classifier is needed"),
        ({"name": "classifier", "classifier": classify}, Cond(torch.ones(2)), "wanted classes"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.run(x, LEVELS, cond, "ddim", rule)
    assert spy.calls == [] and extra
    with pytest.raises(ValueError, match="needs the model 'weak'"):
        plain.run(x, LEVELS, pair_cond(2), "ddim", "autoguidance")


def test_linear_ag_of_another_setting_is_refused():
    spy = Spy()
    engine = sampler.Engine(spy.denoiser)
    # As another processor rounds them: that is the same schedule still.
    keys = {"levels": [[round(v, 6) + 1e-6 for v in level[1:]] for level in LEVELS[:-1]]}
    known = Coefficients(FITTED.cond, FITTED.uncond, {**FITTED.keys, **keys})
    rule = {**RULES["linear_ag"], "coefficients": known}
    engine.run(noise(2), LEVELS, conditions(2), "ddim", rule)
    spy.calls.clear()
    with pytest.raises(ValueError, match="same schedule and steps"):
        engine.run(noise(2), vp_grid(STEPS, start=700), conditions(2), "ddim", rule)
    assert spy.calls == []
    with pytest.raises(ValueError, match="beyond the 10 steps"):
        engine.run(noise(2), (*LEVELS[:-1], *LEVELS[-2:]), conditions(2), "ddim", rule)
    with pytest.raises(ValueError, match="prediction = 'eps'"):
        sampler.Engine(Spy("v").denoiser).run(noise(2), LEVELS, conditions(2), "ddim", rule)
    with pytest.raises(sampler.SamplerError, match="not a LinearAG coefficients file"):
        sampler.build("guidance", {"name": "linear_ag", "coefficients": "nowhere.json"})


def test_warnings_of_odd_but_possible_settings():
    with pytest.warns(UserWarning, match="does not decay"):
        sampler.build("guidance", {"name": "apg", "momentum": 1.0})
    with pytest.warns(UserWarning, match="no history"):
        policy = [0, *[1] * 9]
        sampler.build("guidance", {**RULES["linear_ag"], "policy": policy})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in RULES.values():
            sampler.build("guidance", spec)


def test_shapes_that_do_not_fit_are_refused():
    level = Level(0, 0.6, 0.8)
    x = noise(1)
    preds = {
        "cond": Prediction.of("eps", x, x, level),
        "weak": Prediction.of("eps", x[:, :1], x[:, :1], level),
    }
    rule = sampler.build("guidance", "autoguidance")
    with pytest.raises(ValueError, match="same latents"):
        rule.combine(x, preds, Span(0, level, level), ())
    gfcg = sampler.build(
        "guidance", {"name": "gfcg", "classifier": lambda x0: x0.flatten(1)[:, :1]}
    )
    with pytest.raises(ValueError, match="K >= 2"):
        sampler.Engine(Spy().denoiser).run(noise(2), LEVELS, conditions(2), "ddim", gfcg)
