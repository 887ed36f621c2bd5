"""What is learned from episodes, without Lightning."""

from steppo.learner.correction import Correction, ImportanceCorrection, NoCorrection
from steppo.learner.update import Figures, UpdateLoss

__all__ = ["Correction", "Figures", "ImportanceCorrection", "NoCorrection", "UpdateLoss"]
