"""A student in the plane, x = m + L·z, and a linear fake score: the trainer's own updates."""

from types import SimpleNamespace

import torch

import sampler
from sampler import registry
from sampler.core.noise import initial
from sampler.engine import Engine
from sampler.training.batches import batch
from sampler.training.f_distill.micro_batch import PERTURB
from sampler.training.f_distill.networks import Distilled
from sampler.training.session import Session
from sampler.types import Cond

M, L = torch.tensor([1.0, -0.5]), torch.tensor([[1.5, 0.0], [0.5, 0.4]])
SCHEDULE = sampler.Schedule.from_config(
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}, "DDIMScheduler"
)


class Toy:
    """Stand-in for the session of `Step`, without a pipeline; one noise level, at which the best
    estimate of a Gaussian is linear in x in every parametrisation."""

    def __init__(self, kind, share, rows=96):
        torch.manual_seed(0)
        self.fake, self.kind, self.rows = torch.nn.Linear(2, 2), kind, rows
        models = {
            "fake": lambda x, level, cond: self.fake(x),
            "student": self.student_out,
        }
        world = sampler.denoiser(self.student_out, kind, models)
        pipeline = SimpleNamespace(
            schedule=SCHEDULE,
            device=torch.device("cpu"),
            latent_shape=lambda height, width: (2,),
            encode=lambda prompts, negative, guided, size: Cond(torch.zeros(len(prompts))),
        )
        engine = Engine(world, pipeline, "ddim", "none")
        parameters = {f"fake.{k}": p for k, p in self.fake.named_parameters()}
        made = Distilled(world, self.fake, parameters, {})
        self.session = Session(
            engine, None, engine.sampler, engine.guidance, 1, (8, 8), rows, trainable=made
        )
        times = (share, share + 1e-6)
        spec = {"name": "f_distill", "divergence": "rkl", "gan_weight": 0.0, "times": times}
        self.trainer = registry.build("trainer", spec)

    def student_out(self, z, level, cond):
        """Output of a network of this kind whose estimate of x0 is m + L·z."""
        x0, a, s = M + z @ L.T, level.alpha, level.sigma
        eps = (z - a * x0) / s
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0}[self.kind]

    def learn_fake(self, updates):
        adam = torch.optim.Adam(self.fake.parameters(), lr=0.1, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
        for number in range(updates):
            adam.zero_grad()
            step = self.trainer.step(self.session, batch(["a"], self.rows, number, 0))
            for part in step.critics():
                assert part.prefix == "fake."
                part.loss.backward()
            adam.step()
            schedule.step()

    @torch.no_grad()
    def fake_error(self):
        """Distance of the fake's x0 to the posterior mean, beside the spread of the latter."""
        step = self.trainer.step(self.session, batch(["a"], 1024, 10**6, 0))
        part = step.draw.part(range(1024), self.trainer.times)
        made = step.networks.student(part, 0)
        x = made.x0
        torch.testing.assert_close(x, M + initial(part.seeds, (2,)) @ L.T, rtol=1e-3, atol=1e-3)
        noisy = made.noised(part.level, part.noise(x, PERTURB))
        found = step.networks.evaluate("fake", noisy, part.level, part).x0.tensor()
        a, s = float(part.level.alpha[0]), float(part.level.sigma[0])
        prior = L @ L.T
        gain = a * prior @ torch.linalg.inv(a**2 * prior + s**2 * torch.eye(2))
        true = M + (noisy - a * M) @ gain.T
        return float((found - true).norm() / (true - true.mean(0)).norm())
