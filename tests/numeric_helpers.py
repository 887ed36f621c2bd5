"""What the tests of the numerical parts share: distances and random numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

# Property tests: few examples, the same ones on every run, no time limit on one of them.
FEW = settings(deadline=None, max_examples=25, derandomize=True)


def close(actual: Tensor, expected: object, tolerance: float = 1e-9) -> None:
    """Asserts equal shapes and element-wise equality, absolute or relative; for float64."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Asserts that the norm of the difference is small beside the norm of what is expected; for float32."""
    expected = expected.double()
    assert actual.shape == expected.shape
    difference = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
    assert difference <= tolerance, f"differs by {difference:.2e} of its norm"


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.from_numpy(rng.standard_normal(shape))


def steps_of(lengths: list[int]) -> Tensor:
    """``step_of_A`` of steps with so many action tokens."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
