"""Objectives of reward fine-tuning, as pure functions of tensors and numbers.

Notation: sigma in [0, 1] is the flow level, x = (1 − sigma)·x0 + sigma·eps, velocity v = eps − x0,
D the estimate of x0; mean(·) runs over the elements of a sample. Functions of predictions take
`Prediction` values of any parametrisation, or tensors where only the estimate of x0 matters.
"""

from __future__ import annotations

from sampler.objectives.advantages import gdpo_advantages, group_advantages, optimality
from sampler.objectives.few_step import fake_score_loss, mixed_noise, renoised, student_loss
from sampler.objectives.matching import (
    denoising_error,
    direct_align,
    dpo_loss,
    matching_log_prob,
    min_snr_weight,
    nft_loss,
    output_distance,
    velocity_distance,
)
from sampler.objectives.policy import clipped_loss, dppo_keep, gaussian_kl, guarded_log_ratio
from sampler.objectives.proximal import proximal_gamma, proximal_matching_loss
from sampler.objectives.schedules import matching_times, old_decay, sde_window
from sampler.objectives.scoring import geneval_correct, geneval_share, score_questions

__all__ = [
    "clipped_loss",
    "denoising_error",
    "direct_align",
    "dpo_loss",
    "dppo_keep",
    "fake_score_loss",
    "gaussian_kl",
    "gdpo_advantages",
    "geneval_correct",
    "geneval_share",
    "group_advantages",
    "guarded_log_ratio",
    "matching_log_prob",
    "matching_times",
    "min_snr_weight",
    "mixed_noise",
    "nft_loss",
    "old_decay",
    "optimality",
    "output_distance",
    "proximal_gamma",
    "proximal_matching_loss",
    "renoised",
    "score_questions",
    "sde_window",
    "student_loss",
    "velocity_distance",
]
