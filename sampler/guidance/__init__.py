"""The guidance rules: one file per rule. A new one is a file and a line here."""

from sampler.guidance.cfg import CFG
from sampler.guidance.none import Unguided

__all__ = ["CFG", "Unguided"]
