"""The guidance rules: one file per rule. A new one is a file and a line here."""

from sampler.guidance.adaptive import Adaptive
from sampler.guidance.apg import APG
from sampler.guidance.autoguidance import Autoguidance
from sampler.guidance.blend import Blend
from sampler.guidance.cads import CADS
from sampler.guidance.cfg import CFG
from sampler.guidance.cfg_pp import CFGPP
from sampler.guidance.cfg_zero import CFGZero
from sampler.guidance.classifier import ClassifierGuidance
from sampler.guidance.data import Data
from sampler.guidance.embedded import Embedded
from sampler.guidance.forecast import Forecast
from sampler.guidance.gfcg import GFCG
from sampler.guidance.linear_ag import LinearAG
from sampler.guidance.nag import NAG
from sampler.guidance.none import Unguided
from sampler.guidance.reward import RewardGuidance
from sampler.guidance.student import Student
from sampler.guidance.sum import Sum

__all__ = [
    "APG",
    "CADS",
    "CFG",
    "CFGPP",
    "GFCG",
    "NAG",
    "Adaptive",
    "Autoguidance",
    "Blend",
    "CFGZero",
    "ClassifierGuidance",
    "Data",
    "Embedded",
    "Forecast",
    "LinearAG",
    "RewardGuidance",
    "Student",
    "Sum",
    "Unguided",
]
