"""Laws of noise levels: exact moments, distributions, the share of the run, and the levels."""

import math
import random
from statistics import NormalDist

import pytest

from sampler.core.schedule import Schedule
from sampler.training.f_distill.trainer import FDistill
from sampler.training.time_shares import level_of, share_of, time_of
from sampler.training.times import LAWS, time_law

FLOW = Schedule.flow({"num_train_timesteps": 1000})
VP = Schedule.vp({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                  "num_train_timesteps": 1000})  # fmt: skip
EDM = Schedule.edm({})


def shares(spec, progress=0.0, count=10_000, schedule=FLOW):
    """The quantiles at the midpoints of `count` equal parts of [0, 1)."""
    law = time_law(spec, "times")
    return [law.share((i + 0.5) / count, progress, schedule) for i in range(count)]


def moments(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


@pytest.mark.parametrize(
    ("progress", "mean", "std"),
    [(0.0, 840.4, 120.6), (0.54, 840.4, 120.6), (0.675, 709.2, 167.5), (0.8, 500.0, 190.9),
     (1.0, 500.0, 190.9)],
)  # fmt: skip
def test_movis_has_the_moments_of_its_truncated_normal(progress, mean, std):
    """Exact ones at mu = 1000, 750 and 500, in thousandths of the training time."""
    found = moments([1000 * f for f in shares("movis", progress)])
    assert found == pytest.approx((mean, std), abs=0.06)


@pytest.mark.parametrize(
    ("spec", "mean", "std"),
    [("uniform", 0.5, 1 / math.sqrt(12)), ("logit_normal", 0.5, 0.20827),
     ({"name": "logit_normal", "m": 1.0}, 0.69673, 0.18262)],
)  # fmt: skip
def test_moments_of_the_laws_that_do_not_change(spec, mean, std):
    assert moments(shares(spec)) == pytest.approx((mean, std), abs=1e-4)
    assert shares(spec, 0.9, 100) == shares(spec, 0.0, 100)


def cdf_of(spec, progress):
    """The distribution function of f, from each law's definition."""
    normal = NormalDist()
    name = spec if isinstance(spec, str) else spec["name"]
    if name == "uniform":
        return lambda f: f
    if name == "logit_normal":
        return lambda f: normal.cdf((math.log(f / (1 - f)) - spec["m"]) / spec["s"])
    if name == "movis":
        own = NormalDist(500 if progress == 1 else 1000, 200)
        low, high = own.cdf(0), own.cdf(1000)
        return lambda f: (own.cdf(1000 * f) - low) / (high - low)
    if name == "pieces":
        return lambda f: min(max((f - 0.5) / 0.4, 0), 1)

    def laplace(f):  # of log-SNR = 2·log((1 − f)/f); a large f is a small log-SNR
        x = (2 * math.log((1 - f) / f) - spec["m"]) / spec["b"]
        return 1 - (0.5 * math.exp(x) if x < 0 else 1 - 0.5 * math.exp(-x))

    return laplace


STAGES = [[0.25, 0.0, 0.5], [0.75, 0.5, 0.9]]


@pytest.mark.parametrize("progress", [0.5, 1.0])
@pytest.mark.parametrize(
    "spec",
    ["uniform", {"name": "logit_normal", "m": -0.5, "s": 0.8}, "movis",
     {"name": "pieces", "stages": STAGES}, {"name": "laplace", "m": 1.0, "b": 0.7}],
    ids=lambda spec: spec if isinstance(spec, str) else spec["name"],
)  # fmt: skip
def test_draws_follow_their_law(spec, progress):
    """Kolmogorov–Smirnov, 10,000 draws: the distance is below its 0.1 % quantile, 1.95/√n."""
    law, generator = time_law(spec, "times"), random.Random(1)
    found = sorted(law.share(generator.random(), progress, FLOW) for _ in range(10_000))
    cdf = cdf_of(spec, progress)
    distance = max(
        max(abs(cdf(f) - i / len(found)), abs(cdf(f) - (i + 1) / len(found)))
        for i, f in enumerate(found)
        if 0 < f < 1
    )
    assert distance < 1.95 / math.sqrt(len(found))


def test_pieces_change_at_the_ends_of_their_parts():
    spec = {"name": "pieces", "stages": STAGES}
    ranges = [(0.0, 0.0, 0.5), (0.249, 0.0, 0.5), (0.25, 0.5, 0.9), (1, 0.5, 0.9)]
    for progress, low, high in ranges:
        found = shares(spec, progress, 100)
        assert min(found) == pytest.approx(low, abs=0.01) and max(found) < high


@pytest.mark.parametrize("schedule", [FLOW, VP, EDM], ids=["flow", "vp", "edm"])
def test_laplace_is_a_law_of_log_snr_in_every_schedule(schedule):
    """The median level has log-SNR m, the quartiles are m ± b·log 2."""
    law = time_law({"name": "laplace", "m": 0.5, "b": 0.8}, "times")
    for u, wanted in ((0.5, 0.5), (0.25, 0.5 + 0.8 * math.log(2)), (0.75, 0.5 - 0.8 * math.log(2))):
        level = level_of(schedule, law.share(u, 0.0, schedule))
        assert 2 * math.log(level.alpha / level.sigma) == pytest.approx(wanted, abs=0.01)
    for u in (0.0, 1 - 2**-53):  # moved to the nearest level of the model
        assert 0 <= law.share(u, 0.0, schedule) <= 1


def test_uniform_shares_hit_every_timestep_equally_often():
    times = [time_of(VP, f) for f in shares("uniform", count=4000)]
    assert {times.count(t) for t in range(1000)} == {4}
    assert (time_of(VP, 0.0), time_of(VP, 1.0)) == (0, 999)
    assert [time_of(FLOW, f) for f in (0.0, 0.3, 1.0)] == [0.0, 300.0, 1000.0]
    assert all(time_of(VP, share_of(VP, level_of(VP, f).sigma / level_of(VP, f).alpha)) == t
               for f, t in ((0.1, 100), (0.5, 500), (0.999, 999)))  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "problem"),
    [("moviz", "unknown law 'moviz' (did you mean 'movis'?)"), (3, "a name or a mapping"),
     ({"name": "movis", "p": 1}, "'movis' has no field 'p'"),
     ({"name": "movis", "p1": 0.9, "p2": 0.2}, "p1 = 0.9 must be at most p2 = 0.2"),
     ({"name": "movis", "std": 0}, "std = 0"), ({"name": "laplace", "b": -1}, "b = -1"),
     ({"name": "logit_normal", "s": 0}, "s = 0"),
     ({"name": "pieces", "stages": [[0.5, 0, 1]]}, "parts add up to 1"),
     ({"name": "pieces", "stages": [[1, 0.5, 0.5]]}, "low < high")],
)  # fmt: skip
def test_wrong_laws_are_one_sentence(spec, problem):
    with pytest.raises(ValueError) as error:
        FDistill(law=spec)
    told = str(error.value)
    assert told.startswith("f_distill: law") and problem in told and "\n" not in told


def test_a_law_is_found_again_in_the_settings_of_a_run():
    from sampler import registry

    trainer = FDistill(law={"name": "movis", "p1": 0.1, "p2": 0.2})
    assert registry.spec_of(trainer)["law"] == {"name": "movis", "p1": 0.1, "p2": 0.2, "std": 200.0}
    assert registry.build("trainer", registry.spec_of(trainer)) == trainer
    assert trainer.scheduled and not FDistill().scheduled
    assert set(LAWS) == {"uniform", "logit_normal", "movis", "pieces", "laplace"}
