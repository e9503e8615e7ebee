"""Reward fine-tuning. A new trainer is a file here and a line below."""

from sampler.finetune import alignprop, policy

__all__ = ["alignprop", "policy"]
