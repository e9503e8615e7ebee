"""The samplers: one file per method. A new one is a file and a line here."""

from sampler.samplers.consistency import Consistency
from sampler.samplers.ddim import DDIM
from sampler.samplers.flow_policy import CPS, DanceSDE, FlowSDE
from sampler.samplers.ghvb import GHVB
from sampler.samplers.heavy_ball import HeavyBall
from sampler.samplers.heun import Heun
from sampler.samplers.multistep import AdamsBashforth
from sampler.samplers.nesterov import Nesterov
from sampler.samplers.reddiff import REDDiff
from sampler.samplers.solvers import DPMSolverPP2M, UniPC

__all__ = [
    "CPS",
    "DDIM",
    "GHVB",
    "AdamsBashforth",
    "Consistency",
    "DanceSDE",
    "FlowSDE",
    "DPMSolverPP2M",
    "HeavyBall",
    "Heun",
    "Nesterov",
    "REDDiff",
    "UniPC",
]
