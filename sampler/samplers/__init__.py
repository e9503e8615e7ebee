"""The samplers: one file per method. A new one is a file and a line here."""

from sampler.samplers.ddim import DDIM
from sampler.samplers.multistep import AdamsBashforth

__all__ = ["DDIM", "AdamsBashforth"]
