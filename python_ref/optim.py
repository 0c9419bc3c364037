"""Optimizer updates as pure functions: (parameter, gradient, state) -> (parameter, state).

Each has a dense form and, given `rows`, a form that touches only those rows: the gradient then
holds just them, and parameters and state of every other row stay as they are, bit for bit. That is
what a table needs of which a step reads a small part. It is not the dense update with zero
gradients, which would still decay the untouched rows' momenta and weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, IntArray, f64, i64

Rows = IntArray | slice


@dataclass(frozen=True)
class AdamState:
    """step counts updates; the moments are shaped like the parameter."""

    step: int
    exp_avg: FloatArray
    exp_avg_sq: FloatArray


@dataclass(frozen=True)
class AdagradState:
    """One accumulator a row, [N]."""

    sum_sq: FloatArray


@dataclass(frozen=True)
class SGDState:
    """The momentum buffer, shaped like the parameter."""

    momentum: FloatArray


def adam_init(param: npt.ArrayLike) -> AdamState:
    """Zero moments."""
    param = f64(param)
    return AdamState(0, np.zeros_like(param), np.zeros_like(param))


def adagrad_init(param: npt.ArrayLike, initial: float = 0.0) -> AdagradState:
    """Accumulators at `initial`."""
    return AdagradState(np.full(f64(param).shape[0], initial))


def sgd_init(param: npt.ArrayLike) -> SGDState:
    """Zero momentum."""
    return SGDState(np.zeros_like(f64(param)))


def adam_update(
    param: npt.ArrayLike,
    grad: npt.ArrayLike,
    state: AdamState,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    rows: npt.ArrayLike | None = None,
) -> tuple[FloatArray, AdamState]:
    """Adam (arXiv 1412.6980, algorithm 1), or AdamW (arXiv 1711.05101, algorithm 2) if decoupled.

        p <- p - lr * weight_decay * p          decoupled; else g <- g + weight_decay * p
        m <- beta_1 m + (1 - beta_1) g
        v <- beta_2 v + (1 - beta_2) g^2
        p <- p - lr * (m / (1 - beta_1^step)) / (sqrt(v / (1 - beta_2^step)) + eps)

    param [N, ...]; grad like param, or with rows [K] (distinct) their gradient [K, ...]. The bias
    correction counts all steps, also those which did not touch a row.
    Raises ValueError on repeated rows or a wrong gradient shape, IndexError on a row out of range.
    """
    param, grad, touched = _checked(param, grad, rows)
    step = state.step + 1
    p, m, v = param[touched], state.exp_avg[touched], state.exp_avg_sq[touched]
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        grad = grad + weight_decay * p
    beta_1, beta_2 = betas
    m = beta_1 * m + (1.0 - beta_1) * grad
    v = beta_2 * v + (1.0 - beta_2) * grad * grad
    corrected_m = m / (1.0 - beta_1**step)
    corrected_v = v / (1.0 - beta_2**step)
    p = p - lr * corrected_m / (np.sqrt(corrected_v) + eps)
    return _with_rows(param, touched, p), AdamState(
        step,
        _with_rows(state.exp_avg, touched, m),
        _with_rows(state.exp_avg_sq, touched, v),
    )


def adagrad_update(
    param: npt.ArrayLike,
    grad: npt.ArrayLike,
    state: AdagradState,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    rows: npt.ArrayLike | None = None,
) -> tuple[FloatArray, AdagradState]:
    """Adagrad (Duchi, Hazan, Singer, JMLR 2011), one accumulator a row as embedding tables use it.

        g <- g + weight_decay * p
        s <- s + mean over the row of g^2
        p <- p - lr * g / (sqrt(s) + eps)

    param [N, ...]; grad and rows as in adam_update, which says what is raised.
    """
    param, grad, touched = _checked(param, grad, rows)
    p = param[touched]
    grad = grad + weight_decay * p
    mean_sq = (grad * grad).mean(axis=tuple(range(1, grad.ndim)))
    sum_sq = state.sum_sq[touched] + mean_sq
    step_size = lr / (np.sqrt(sum_sq) + eps)
    p = p - step_size.reshape(-1, *(1,) * (grad.ndim - 1)) * grad
    return _with_rows(param, touched, p), AdagradState(_with_rows(state.sum_sq, touched, sum_sq))


def sgd_update(
    param: npt.ArrayLike,
    grad: npt.ArrayLike,
    state: SGDState,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    rows: npt.ArrayLike | None = None,
) -> tuple[FloatArray, SGDState]:
    """Gradient descent with heavy-ball momentum.

        g <- g + weight_decay * p
        b <- momentum * b + g
        p <- p - lr * b

    param [N, ...]; grad and rows as in adam_update, which says what is raised.
    """
    param, grad, touched = _checked(param, grad, rows)
    p = param[touched]
    buffer = momentum * state.momentum[touched] + grad + weight_decay * p
    return (
        _with_rows(param, touched, p - lr * buffer),
        SGDState(_with_rows(state.momentum, touched, buffer)),
    )


def _checked(
    param: npt.ArrayLike, grad: npt.ArrayLike, rows: npt.ArrayLike | None
) -> tuple[FloatArray, FloatArray, Rows]:
    param, grad = f64(param), f64(grad)
    touched: Rows = slice(None)
    expected = param.shape
    if rows is not None:
        touched = i64(rows, "rows")
        if np.unique(touched).size != touched.size:
            raise ValueError("rows must be distinct: their gradients are summed before the update")
        if touched.size and (touched.min() < 0 or touched.max() >= param.shape[0]):
            raise IndexError(f"rows must lie in [0, {param.shape[0]})")
        expected = (touched.size, *param.shape[1:])
    if grad.shape != expected:
        raise ValueError(f"grad must be {expected}, got {grad.shape}")
    return param, grad, touched


def _with_rows(array: FloatArray, touched: Rows, new: FloatArray) -> FloatArray:
    array = array.copy()
    array[touched] = new
    return array
