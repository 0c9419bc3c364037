"""How the tests of the reference judge a hand-derived gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ultramem_cuda import python_ref as ref


def assert_matches_finite_differences(
    function: Callable[..., object],
    arguments: Sequence[np.ndarray],
    gradients: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> None:
    """gradients[i] is the derivative of the scalar function(*arguments) by arguments[i].

    Each argument is varied alone along a random direction, so that a gradient which is wrong or
    missing cannot hide behind another.
    """
    value = abs(float(np.asarray(function(*arguments))))
    for i, gradient in enumerate(gradients):
        assert gradient.shape == np.shape(arguments[i])
        directions = [np.zeros(np.shape(argument)) for argument in arguments]
        directions[i] = rng.standard_normal(np.shape(arguments[i]))
        numeric = float(ref.directional_derivative(function, arguments, directions))
        analytic = float((gradient * directions[i]).sum())
        size = float(np.linalg.norm(gradient) * np.linalg.norm(directions[i]))
        assert abs(numeric - analytic) <= 1e-7 * size + 1e-11 * value, f"argument {i}"


def assert_close(actual: np.ndarray, expected: torch.Tensor | None, bound: float = 1e-11) -> None:
    """actual agrees with a tensor; None stands for a gradient autograd found no path for."""
    if expected is None:
        assert not actual.any()
        return
    assert ref.relative_l2(actual, expected.detach().numpy()) <= bound


def leaf(x: np.ndarray) -> torch.Tensor:
    """x as a float64 tensor that collects a gradient."""
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)
