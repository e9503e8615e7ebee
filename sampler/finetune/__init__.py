"""Reward fine-tuning and distillation. A new trainer is a file here and a line below."""

from sampler.finetune import alignprop, f_distill, policy

__all__ = ["alignprop", "f_distill", "policy"]
