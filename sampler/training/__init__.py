"""Fine-tuning and distillation. A new trainer is a file here and a line below."""

from sampler.training.alignprop.trainer import AlignProp
from sampler.training.denoise.trainer import Denoise
from sampler.training.f_distill.trainer import FDistill
from sampler.training.matching.dpo import DPO
from sampler.training.matching.trainers import AWM, NFT
from sampler.training.policy.grpo import GRPO
from sampler.training.policy.trainers import DDPO, RLCM
from sampler.training.prox_matching import ProxMatching
from sampler.training.srpo import SRPO

__all__ = [
    "AWM",
    "DDPO",
    "DPO",
    "GRPO",
    "NFT",
    "RLCM",
    "SRPO",
    "AlignProp",
    "Denoise",
    "FDistill",
    "ProxMatching",
]
