"""Lightning callbacks: rollouts, evaluation, warm start, quantisation, progress."""

from callbacks.evaluation import EvaluationCallback
from callbacks.progress import StepProgressBar
from callbacks.quantization import QuantizationCallback
from callbacks.rollout import RolloutCallback
from callbacks.warm_start import WarmStartCallback

__all__ = ["EvaluationCallback", "QuantizationCallback", "RolloutCallback", "StepProgressBar", "WarmStartCallback"]
