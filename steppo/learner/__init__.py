"""What is learned from episodes, without Lightning."""

from steppo.learner.correction import Correction, ImportanceCorrection, NoCorrection
from steppo.learner.experience import Experience
from steppo.learner.learner import Learner
from steppo.learner.optim import OptimizerSettings
from steppo.learner.update import OldLogprobs, ReplayStatistics, UpdateStatistics

__all__ = [
    "Correction",
    "Experience",
    "ImportanceCorrection",
    "Learner",
    "NoCorrection",
    "OldLogprobs",
    "OptimizerSettings",
    "ReplayStatistics",
    "UpdateStatistics",
]
