"""Test bed of every registered strategy: a small world with exact answers.

A strategy that cannot be built from its name alone gets an example in EXAMPLES; a new one that
has neither fails `test_every_strategy_is_covered`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import sampler
from sampler import registry
from sampler.guidance.spaces import choose, choose_state
from sampler.types import GuidanceBase, Prediction
from tests.analytic import flow_grid, mixture, vp_grid

SHAPE = (2, 2, 2)
COND, UNCOND, WEAK = (mixture(8, seed, spread=s) for seed, s in ((1, 1.5), (2, 1.0), (3, 1.2)))

# (kind, name) -> spec; None: not for this world, with its own tests elsewhere.
EXAMPLES: dict[tuple[str, str], Any] = {
    ("guidance", "cfg_zero"): {"name": "cfg_zero", "zero_init_steps": 0},  # no flow model here
    # the runs of these laws are short, and their steps large
    ("guidance", "forecast"): {"name": "forecast", "warmup": 2, "tolerance": 0.2},
    ("guidance", "blend"): {
        "name": "blend",
        "image": torch.full((1, *SHAPE), 0.3),
        "mask": torch.tensor([[0.0, 1.0], [0.25, 1.0]]),
        "rule": {"name": "cfg", "scale": 3.0},
    },
    ("guidance", "cads"): None,  # its conditions are text states: tests/guidance
    ("guidance", "nag"): None,  # it needs a network with attention: tests/guidance
    ("guidance", "linear_ag"): None,  # fitted for one grid: tests/guidance
    ("guidance", "embedded"): None,  # needs a network with that input: tests/pipelines
    ("guidance", "gfcg"): None,  # these need a classifier: tests/guidance
    ("guidance", "classifier"): None,
    ("guidance", "reward"): None,  # it needs a decoder: tests/guidance
    ("guidance", "data"): {
        "name": "data",
        "operator": "denoise",
        "y": torch.full((1, *SHAPE), 0.3),
        "noise": 0.5,
    },
    ("sampler", "daps"): {
        "name": "daps",
        "operator": "denoise",
        "y": torch.full((1, *SHAPE), 0.3),
        "noise": 0.5,
    },
    ("sampler", "admm"): {
        "name": "admm",
        "operator": "denoise",
        "y": torch.full((1, *SHAPE), 0.3),
        "noise": 0.5,
    },
    ("sampler", "difface"): {
        "name": "difface",
        "operator": "denoise",
        "y": torch.full((1, *SHAPE), 0.3),
    },
    ("sampler", "reddiff"): {
        "name": "reddiff",
        "operator": "denoise",
        "y": torch.full((1, *SHAPE), 0.3),
    },
}


FLOW_ONLY = {"flow_sde", "dance_sde"}  # samplers that refuse the levels of other processes


def grid(name: str, steps: int) -> tuple[sampler.Level, ...]:
    """Levels that the sampler of this name accepts, ending without noise."""
    return flow_grid(steps, high=0.95) if name in FLOW_ONLY else vp_grid(steps)


def spec(kind: str, name: str) -> Any:
    return EXAMPLES.get((kind, name), name)


def buildable(kind: str) -> list[str]:
    return [name for name in registry.names(kind) if spec(kind, name) is not None]


class Counting:
    """A denoiser that counts what it is really asked: calls, and rows per call."""

    def __init__(self, prediction: str = "eps") -> None:
        self.rows: list[int] = []

        def network(cond, uncond) -> Callable[..., torch.Tensor]:
            def fn(x, level, which):
                self.rows.append(x.shape[0])
                yes, no = (m.out(x, level, prediction) for m in (cond, uncond))
                return torch.where(which.view(-1, 1, 1, 1) > 0.5, yes, no)

            return fn

        self.denoiser = sampler.denoiser(
            network(COND, UNCOND),
            prediction,
            {"weak": network(WEAK, UNCOND), "student": network(COND, UNCOND)},
        )


@dataclass(frozen=True)
class Rests(GuidanceBase):
    """Any rule, with its last output held for a row at every third step, counted per row."""

    rule: object
    first: int = 0  # the number of the first row

    @property
    def needs(self):
        return self.rule.needs

    def start(self, cond):
        return self.rule.start(cond), None

    def due(self, x, span):
        number = torch.arange(x.shape[0]) + self.first
        return (span.index + number) % 3 != 0 if span.index else torch.ones(x.shape[0]).bool()

    def plan(self, x, span, cond, state):
        due = self.due(x, span)
        found = {}
        for name, branch in self.rule.plan(x, span, cond, state[0]).items():
            rows = due if branch.rows is None else due & branch.rows
            if rows.any():
                found[name] = replace(branch, rows=rows)
        return found

    def combine(self, x, preds, span, state):
        inner, last = state
        due = self.due(x, span)
        if not due.any():
            return Prediction.of(last["kind"], x, last["out"], span.now), state
        pred, after = self.rule.combine(x, preds, span, inner)
        out = pred.out
        if last is not None:
            out = choose(due, out, sampler.Lin.of(last["out"]))
            after = choose_state(due, after, inner)
        return pred.like(out), (after, {"kind": pred.kind, "out": out})


def cond(rows: int) -> sampler.Cond:
    return sampler.Cond(cond=torch.ones(rows), uncond=torch.zeros(rows))


def noise(rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(7)).to(dtype)


def run(sampler_spec: Any, rule: Any, levels: Any, x: torch.Tensor, **options: Any):
    engine = sampler.Engine(Counting(options.pop("prediction", "eps")).denoiser)
    return engine.run(
        x, levels, options.pop("cond", cond(x.shape[0])), sampler_spec, rule, **options
    )
