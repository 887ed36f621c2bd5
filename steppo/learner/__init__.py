"""What is learned from episodes, without Lightning."""

from steppo.learner.correction import Bypass, Correction, CorrectionInputs, ImportanceCorrection, NoCorrection, Weights
from steppo.learner.experience import Experience
from steppo.learner.learner import Learner
from steppo.learner.optim import OptimizerSettings
from steppo.learner.update import OldLogprobs, ReplayStatistics, UpdateStatistics

__all__ = [
    "Bypass",
    "Correction",
    "CorrectionInputs",
    "Experience",
    "ImportanceCorrection",
    "Learner",
    "NoCorrection",
    "OldLogprobs",
    "OptimizerSettings",
    "ReplayStatistics",
    "UpdateStatistics",
    "Weights",
]
