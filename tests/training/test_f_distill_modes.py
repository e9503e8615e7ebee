"""Effect of the divergences on a student, on problems with known answers."""

import math

import pytest
import torch

from sampler.guidance.f_divergence import WEIGHTS
from sampler.training.f_distill.losses import discriminator_loss
from scripts.study.fdistill import Students, student, teacher, trained
from tests.training.f_distill_toy import Toy

BOTH = {"kl", "js", "sh", "jf", "lecam"}


def masses(sigmas, names, **options):
    return dict(zip(names, trained(list(names), sigmas, 0, **options).left().tolist(), strict=True))


def test_covering_divergences_find_the_other_mode():
    """Noise sigma in 0.5..1.5: the covering ones have half of their mass left of 0, the mode
    seeking ones stay on the right. With and without division of h by its mean."""
    names = ("kl", "js", "sh", "jf", "lecam", "rkl", "sf")
    for found in (
        masses((0.5, 1.5), names, batch=256),
        masses((0.5, 1.5), names[:4], batch=256, normalise=False),
    ):
        for name, left in found.items():
            assert abs(left - 0.5) < 0.015 if name in BOTH else left < 0.01, (name, left)


def test_what_the_student_never_visits_is_not_seen():
    """With little noise the covering divergences miss the other mode, too."""
    found = masses((0.05, 0.5), ("rkl", "kl", "js", "jf"), batch=256)
    assert all(left < 0.01 for left in found.values())


def test_with_much_noise_reverse_kl_covers_too():
    """So the range of noise matters as much as f."""
    found = masses((0.5, 3.0), ("rkl", "kl"), batch=256)
    assert all(abs(left - 0.5) < 0.02 for left in found.values())


def network(outputs):
    return torch.nn.Sequential(
        torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
        torch.nn.Linear(64, outputs),
    )  # fmt: skip


def noisy(x, generator):
    sigma = torch.exp(
        torch.empty(len(x)).uniform_(math.log(0.5), math.log(1.5), generator=generator)
    )
    return x + sigma[:, None] * torch.randn(x.shape, generator=generator), sigma


def real(count, generator):
    modes = torch.tensor([[-3.0, 0.0], [3.0, 0.0]])
    chosen = modes[torch.randint(2, (count,), generator=generator)]
    return chosen + 0.5 * torch.randn(count, 2, generator=generator)


def test_the_discriminator_learns_the_ratio_of_teacher_to_student():
    """log r within 0.2 (median, in the bulk), h of it within 15 %; the sign is part of it."""
    of = Students(torch.tensor([[1.0, 0.3]]), torch.tensor([[[2.0, 0.0], [0.0, 0.8]]]))
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    told = network(1)
    steps = 900
    adam = torch.optim.Adam(told.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        fake = of.samples(torch.randn(1, 512, 2, generator=generator))[0]
        (x, s), (y, u) = noisy(real(512, generator), generator), noisy(fake, generator)
        yes, no = (told(torch.cat([v, w.log()[:, None]], 1)) for v, w in ((x, s), (y, u)))
        adam.zero_grad()
        discriminator_loss(yes, no).mean().backward()
        adam.step()
        schedule.step()
    # the bulk: where either of the two is likely
    fake = of.samples(torch.randn(1, 2000, 2, generator=generator))[0]
    x, sigma = noisy(torch.cat([real(2000, generator), fake]), generator)
    with torch.no_grad():
        found = told(torch.cat([x, sigma.log()[:, None]], 1))[:, 0]
        true = (teacher(x[None], sigma[None])[0] - student(x[None], sigma[None], of)[0])[0]
    bulk = true.abs() < 3
    assert float(bulk.float().mean()) > 0.6
    assert float((found - true)[bulk].abs().median()) <= 0.2
    for name in ("js", "sf", "sh"):
        ours, theirs = (WEIGHTS[name](v[bulk].exp()) for v in (found, true))
        assert float((ours / theirs - 1).abs().median()) <= 0.15, name
    assert float(torch.corrcoef(torch.stack([found[bulk], true[bulk]]))[0, 1]) > 0.95


@pytest.mark.parametrize(("kind", "share"), [("eps", 0.2), ("v", 0.3), ("x0", 0.4)])
def test_the_fake_score_converges_to_the_students(kind, share):
    """On a Gaussian student its estimate of x0 becomes the posterior mean, within 5 %.

    By the trainer's own updates, on a small world without a pipeline.
    """
    toy = Toy(kind, share)
    before = toy.fake_error()
    toy.learn_fake(150)
    assert before > 0.3 and toy.fake_error() <= 0.05
