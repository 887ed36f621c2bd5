"""Lightning callbacks: rollouts, evaluation, warm start, checkpoints, progress."""

from callbacks.checkpoint import IterationCheckpoint
from callbacks.evaluation import EvaluationCallback
from callbacks.progress import StepProgressBar
from callbacks.rollout import RolloutCallback
from callbacks.warm_start import WarmStartCallback

__all__ = ["EvaluationCallback", "IterationCheckpoint", "RolloutCallback", "StepProgressBar", "WarmStartCallback"]
