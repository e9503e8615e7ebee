"""Reward fine-tuning and distillation. A new trainer is a file here and a line below."""

from sampler.training.alignprop import trainer as alignprop
from sampler.training.f_distill import trainer as f_distill
from sampler.training.policy import trainers as policy

__all__ = ["alignprop", "f_distill", "policy"]
