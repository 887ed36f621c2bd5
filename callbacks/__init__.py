"""Lightning callbacks: rollouts, evaluation, transcripts, warm start, checkpoints, quantisation, progress."""

from callbacks.checkpoint import IterationCheckpoint
from callbacks.evaluation import EvaluationCallback
from callbacks.progress import StepProgressBar
from callbacks.quantization import QuantizationCallback
from callbacks.rollout import RolloutCallback
from callbacks.transcript import TranscriptCallback
from callbacks.warm_start import WarmStartCallback

__all__ = [
    "EvaluationCallback",
    "IterationCheckpoint",
    "QuantizationCallback",
    "RolloutCallback",
    "StepProgressBar",
    "TranscriptCallback",
    "WarmStartCallback",
]
