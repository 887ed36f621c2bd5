"""What is learned from episodes, without Lightning."""

from steppo.learner.correction import Correction, ImportanceCorrection, NoCorrection

__all__ = ["Correction", "ImportanceCorrection", "NoCorrection"]
