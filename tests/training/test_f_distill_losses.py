"""f-distill's arithmetic against stored values, quadrature and formulas written out."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sampler
from sampler.guidance.f_divergence import WEIGHTS
from sampler.training.f_distill.losses import (
    Weighting,
    discriminator_loss,
    generator_loss,
    matching_loss,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "finetune" / "f_distill_weights.npz")
CASES = json.loads(str(GOLDEN["cases_json"]))
STORED = ("rkl", "kl", "js", "sf", "neyman", "sh", "jf")

# f(r), written out from the table of the specification.
F = {
    "rkl": lambda r: -np.log(r),
    "sf": lambda r: (r + 1) * np.log(0.5 + 1 / (2 * r)),
    "js": lambda r: r * np.log(r) - (r + 1) * np.log((r + 1) / 2),
    "sh": lambda r: (np.sqrt(r) - 1) ** 2,
    "kl": lambda r: r * np.log(r),
    "jf": lambda r: (r - 1) * np.log(r),
    "lecam": lambda r: (r - 1) ** 2 / (2 * (r + 1)),
    "chi2": lambda r: (r - 1) ** 2,
    "neyman": lambda r: (r - 1) ** 2 / r,
}
FACTOR = {"sh": 0.5, "neyman": 2.0}  # where h is used up to a constant


def tensor(key, **options):
    return torch.tensor(GOLDEN[key], **options)


@pytest.mark.parametrize("name", STORED)
def test_weights_equal_the_stored_ones(name):
    found = sampler.f_weight(name, tensor("r"))
    torch.testing.assert_close(found, tensor(f"h_{name}"), rtol=1e-6, atol=1e-9)
    assert sampler.f_weight(name, 2.5) == pytest.approx(
        float(sampler.f_weight(name, torch.tensor(2.5, dtype=torch.float64)))
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['id']}-{c['f_div']}")
def test_the_whole_weighting_equals_the_stored_one(case):
    """Three calls in a row; empty bins keep what they had, clamps bite."""
    times = (case["min_t"], case["max_t"])
    weighting = Weighting(
        case["f_div"],
        case["ratio_lower"],
        case["ratio_upper"],
        times,
        case["ratio_ema_rate"],
        case["ratio_normalization"],
    )
    bins, prefix = [1.0] * case["bin_num"], f"p{case['id']:03d}_"
    for call in range(3):
        logits, t = (tensor(prefix + key)[call] for key in ("logits", "t"))
        h, _, bins = weighting(logits, t, bins)
        torch.testing.assert_close(h, tensor(prefix + "h")[call], rtol=1e-6, atol=1e-6)
        after = tensor(prefix + "bins_after")[call]
        torch.testing.assert_close(torch.tensor(bins), after, rtol=1e-6, atol=1e-6)


def test_the_golden_cases_have_empty_bins_and_clamped_ratios():
    calls = [(c, call) for c in CASES for call in range(3)]
    index = [((GOLDEN[f"p{c['id']:03d}_t"][k] - 0.001) / 0.998 * 10).astype(int) for c, k in calls]
    assert any(len(set(i)) < 10 for i in index)
    ratios = [np.exp(GOLDEN[f"p{c['id']:03d}_logits"][k].mean(1)) for c, k in calls]
    assert any((r > 20).any() for r in ratios) and any((r < 0.1).any() for r in ratios)


def test_matching_has_the_stored_loss_and_gradient_and_only_the_student_gets_one():
    x, teacher, fake = (tensor(f"vsd_{k}") for k in ("gen", "teacher_x0", "fake_x0"))
    h = tensor("vsd_scale")
    for value in (x, teacher, fake, h):
        value.requires_grad_(True)
    loss = matching_loss(x, teacher, fake, h).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(GOLDEN["vsd_loss"]), rel=1e-6)
    torch.testing.assert_close(x.grad, tensor("vsd_grad"), rtol=1e-6, atol=1e-8)
    assert teacher.grad is None and fake.grad is None and h.grad is None
    with torch.no_grad():  # the same, written out
        w = 1 / ((x - teacher).abs().mean((1, 2, 3)) + 1e-6)
        g = (fake - teacher) * (w * h)[:, None, None, None]
    torch.testing.assert_close(x.grad, g / x.numel(), rtol=1e-4, atol=1e-8)


def test_adversarial_losses_equal_the_stored_ones():
    real, fake = tensor("gan_real_logits"), tensor("gan_fake_logits")
    assert float(generator_loss(fake).mean()) == pytest.approx(float(GOLDEN["gan_loss_gen"]), 1e-6)
    found = float(discriminator_loss(real, fake).mean())
    assert found == pytest.approx(float(GOLDEN["gan_loss_disc"]), 1e-6)


def test_reverse_kl_is_plain_distribution_matching_to_the_bit():
    """Whatever the discriminator says, h is 1, and so is the gradient that of DMD."""
    g = torch.Generator().manual_seed(0)
    x, teacher, fake = (torch.randn(5, 4, 3, 3, generator=g) for _ in range(3))
    h, _, bins = Weighting("rkl")(torch.randn(5, 2, generator=g) * 9, torch.rand(5), [1.0] * 10)
    assert bins == [1.0] * 10
    ours, plain = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    matching_loss(ours, teacher, fake, h).mean().backward()
    with torch.no_grad():
        w = 1 / ((x - teacher).abs().flatten(1).mean(1) + 1e-6)
        target = x - (fake - teacher) * w[:, None, None, None]
    (0.5 * (plain - target).square().flatten(1).mean(1)).mean().backward()
    assert torch.equal(ours.grad, plain.grad)


def test_the_ratio_is_teacher_over_student():
    """A fixed sign: where the discriminator says "real", forward KL weighs more and the softened
    reverse KL less. With the sign turned, the two tables change places without any error."""
    logits, t = torch.tensor([[2.0], [-2.0]]), torch.tensor([0.5, 0.5])
    for name, more in (("kl", True), ("js", True), ("sf", False), ("neyman", False)):
        h, r, _ = Weighting(name, normalise=False)(logits, t, [1.0])
        assert bool(h[0] > h[1]) is more, name
        assert r[0] == pytest.approx(math.exp(2)) and r[1] == pytest.approx(math.exp(-2))
    # and a discriminator's loss falls as the logits of real samples rise
    up = discriminator_loss(torch.ones(1, 1), torch.zeros(1, 1))
    assert up < discriminator_loss(-torch.ones(1, 1), torch.zeros(1, 1))
    assert generator_loss(torch.ones(1, 1)) < generator_loss(-torch.ones(1, 1))


@pytest.mark.parametrize("name", sorted(set(F) - {"neyman"}))
def test_the_weighted_score_difference_is_the_gradient_of_the_divergence(name):
    """1-D, p a mixture, q = N(m, s²): quadrature against finite differences of E_q[f(p/q)]."""
    x = np.linspace(-14, 14, 280_001)
    step = x[1] - x[0]

    def normal(m, s):
        return np.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))

    p = 0.6 * normal(-1.0, 0.8) + 0.4 * normal(1.5, 0.6)

    def divergence(m, log_s):
        q = normal(m, math.exp(log_s))
        return float(np.sum(np.where(q > 1e-280, q * F[name](np.maximum(p, 1e-300) / q), 0)) * step)

    m, log_s, e = 0.2, math.log(1.3), 1e-4
    q = normal(m, math.exp(log_s))
    h = sampler.f_weight(name, torch.tensor(p / q)).numpy() * FACTOR.get(name, 1.0)
    gap = np.gradient(np.log(p), x) - np.gradient(np.log(q), x)
    z = (x - m) / math.exp(log_s)
    for moved, at in ((np.ones_like(x), (1, 0)), (z * math.exp(log_s), (0, 1))):
        ours = -np.sum(q * h * gap * moved) * step
        up = divergence(m + e * at[0], log_s + e * at[1])
        down = divergence(m - e * at[0], log_s - e * at[1])
        assert ours == pytest.approx((up - down) / (2 * e), rel=1e-5)


def test_the_second_derivatives_are_those_of_the_table():
    """h = f''(r)·r² by central differences, for every name."""
    r, e = np.geomspace(0.05, 20, 25), 1e-4
    assert set(WEIGHTS) == set(F)
    for name, f in F.items():
        second = (f(r * (1 + e)) - 2 * f(r) + f(r * (1 - e))) / (r * e) ** 2
        ours = sampler.f_weight(name, r) * FACTOR.get(name, 1.0)
        np.testing.assert_allclose(ours, second * r**2, rtol=1e-5)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="one of rkl, sf, js"):
        sampler.f_weight("kullback", 1.0)
