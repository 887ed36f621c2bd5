"""Lightning callbacks: rollouts, evaluation, transcripts, warm start, progress."""

from callbacks.evaluation import EvaluationCallback
from callbacks.progress import StepProgressBar
from callbacks.rollout import RolloutCallback
from callbacks.transcript import TranscriptCallback
from callbacks.warm_start import WarmStartCallback

__all__ = ["EvaluationCallback", "RolloutCallback", "StepProgressBar", "TranscriptCallback", "WarmStartCallback"]
