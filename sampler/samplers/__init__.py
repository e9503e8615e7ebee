"""The samplers: one file per method. A new one is a file and a line here."""

from sampler.samplers.admm import ADMM
from sampler.samplers.aliases import alias
from sampler.samplers.ancestral import EulerAncestral
from sampler.samplers.consistency import Consistency
from sampler.samplers.daps import DAPS
from sampler.samplers.ddim import DDIM
from sampler.samplers.deis import DEIS, GradientEstimation
from sampler.samplers.difface import DifFace
from sampler.samplers.dpmpp import DPMSolverPP2M, DPMSolverPP2MSDE, DPMSolverPP3MSDE
from sampler.samplers.er_sde import ERSDE
from sampler.samplers.flow_policy import CPS, DanceSDE, FlowSDE
from sampler.samplers.ghvb import GHVB
from sampler.samplers.heavy_ball import HeavyBall
from sampler.samplers.heun import Heun
from sampler.samplers.multistep import AdamsBashforth
from sampler.samplers.nesterov import Nesterov
from sampler.samplers.reddiff import REDDiff
from sampler.samplers.res_multistep import RESMultistep
from sampler.samplers.sa_solver import SASolver
from sampler.samplers.two_stage import RES2S, DPMSolverPP2S, DPMSolverPPSDE
from sampler.samplers.unipc import UniPC

__all__ = [
    "ADMM",
    "CPS",
    "DAPS",
    "DDIM",
    "DEIS",
    "ERSDE",
    "GHVB",
    "AdamsBashforth",
    "Consistency",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "DPMSolverPPSDE",
    "RES2S",
    "DPMSolverPP2MSDE",
    "DPMSolverPP3MSDE",
    "DanceSDE",
    "DifFace",
    "EulerAncestral",
    "FlowSDE",
    "GradientEstimation",
    "HeavyBall",
    "Heun",
    "Nesterov",
    "REDDiff",
    "RESMultistep",
    "SASolver",
    "UniPC",
    "alias",
]
