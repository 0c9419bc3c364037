from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref

SHAPE = (6, 5)


def run(update: Callable, state: object, param: np.ndarray, grads: np.ndarray) -> np.ndarray:
    for grad in grads:
        param, state = update(param, grad, state)
    return param


def run_torch(optimizer: Callable, param: np.ndarray, grads: np.ndarray) -> np.ndarray:
    tensor = torch.tensor(param, requires_grad=True)
    stepper = optimizer([tensor])
    for grad in grads:
        tensor.grad = torch.tensor(grad)
        stepper.step()
    return tensor.detach().numpy()


@settings(deadline=None, max_examples=15)
@given(
    lr=st.floats(1e-4, 1.0),
    beta_1=st.floats(0.0, 0.99),
    beta_2=st.floats(0.0, 0.9999),
    weight_decay=st.floats(0.0, 0.5),
    decoupled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_adam_is_torchs(
    lr: float, beta_1: float, beta_2: float, weight_decay: float, decoupled: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    param, grads = rng.standard_normal(SHAPE), rng.standard_normal((5, *SHAPE))
    options = {
        "lr": lr,
        "betas": (beta_1, beta_2),
        "eps": 1e-6,
        "weight_decay": weight_decay,
    }
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = run_torch(lambda p: kind(p, foreach=False, **options), param, grads)
    actual = run(
        lambda *a: ref.adam_update(*a, decoupled=decoupled, **options),
        ref.adam_init(param),
        param,
        grads,
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=15)
@given(
    lr=st.floats(1e-4, 1.0),
    momentum=st.floats(0.0, 0.99),
    weight_decay=st.floats(0.0, 0.5),
    seed=st.integers(0, 2**31),
)
def test_sgd_is_torchs(lr: float, momentum: float, weight_decay: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    param, grads = rng.standard_normal(SHAPE), rng.standard_normal((5, *SHAPE))
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    expected = run_torch(lambda p: torch.optim.SGD(p, foreach=False, **options), param, grads)
    actual = run(lambda *a: ref.sgd_update(*a, **options), ref.sgd_init(param), param, grads)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_adagrad_sums_each_rows_mean_square() -> None:
    rng = np.random.default_rng(0)
    param, grads = rng.standard_normal(SHAPE), rng.standard_normal((4, *SHAPE))
    actual = run(
        lambda *a: ref.adagrad_update(*a, lr=0.1, eps=1e-3),
        ref.adagrad_init(param, initial=0.2),
        param,
        grads,
    )
    expected = param.copy()
    for row in range(SHAPE[0]):
        accumulated = 0.2
        for grad in grads[:, row]:
            accumulated += sum(g * g for g in grad) / SHAPE[1]
            expected[row] -= 0.1 * grad / (accumulated**0.5 + 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_adagrad_over_rows_of_one_is_torchs_adagrad() -> None:
    rng = np.random.default_rng(1)
    param, grads = rng.standard_normal((7, 1)), rng.standard_normal((4, 7, 1))
    options = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.2}
    expected = run_torch(lambda p: torch.optim.Adagrad(p, foreach=False, **options), param, grads)
    actual = run(
        lambda *a: ref.adagrad_update(*a, **options), ref.adagrad_init(param), param, grads
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


UPDATES = {
    "adam": (ref.adam_update, ref.adam_init, {"lr": 0.1, "weight_decay": 0.1}),
    "adam, decay in the gradient": (
        ref.adam_update,
        ref.adam_init,
        {"lr": 0.1, "weight_decay": 0.1, "decoupled": False},
    ),
    "adagrad": (ref.adagrad_update, ref.adagrad_init, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd": (ref.sgd_update, ref.sgd_init, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_touched_rows_move_as_in_the_dense_update_and_the_rest_stays(name: str) -> None:
    update, init, options = UPDATES[name]
    rng = np.random.default_rng(2)
    param = rng.standard_normal(SHAPE)
    # A dense step first, so that the rows left alone have a state which could decay.
    param, state = update(param, rng.standard_normal(SHAPE), init(param), **options)
    grad = rng.standard_normal(SHAPE)
    rows = np.array([4, 0, 3])
    rest = np.array([1, 2, 5])

    dense = update(param, grad, state, **options)
    sparse = update(param, grad[rows], state, rows=rows, **options)
    before = (param, *arrays(state))
    for old, whole, part in zip(
        before, (dense[0], *arrays(dense[1])), (sparse[0], *arrays(sparse[1])), strict=True
    ):
        np.testing.assert_array_equal(part[rows], whole[rows])
        np.testing.assert_array_equal(part[rest], old[rest])
        assert (whole[rest] != old[rest]).any()


def arrays(state: object) -> list[np.ndarray]:
    return [value for value in vars(state).values() if isinstance(value, np.ndarray)]


def test_adam_counts_steps_that_touch_nothing() -> None:
    param = np.ones((3, 2))
    nothing = {"grad": np.zeros((0, 2)), "rows": np.zeros(0, np.int64)}
    after, state = ref.adam_update(param, state=ref.adam_init(param), lr=0.1, **nothing)
    assert state.step == 1
    np.testing.assert_array_equal(after, param)


def test_arguments_are_left_unchanged() -> None:
    param, grad = np.ones(SHAPE), np.ones(SHAPE)
    state = ref.sgd_init(param)
    ref.sgd_update(param, grad, state, lr=1.0, momentum=0.9)
    assert (param == 1).all()
    assert (grad == 1).all()
    assert (state.momentum == 0).all()


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize(
    ("rows", "grad_rows", "error"),
    [
        ([1, 1], 2, ValueError),
        ([0, 6], 2, IndexError),
        ([-1], 1, IndexError),
        ([0], 2, ValueError),
        (None, 2, ValueError),
    ],
)
def test_bad_rows_raise(
    name: str, rows: list[int] | None, grad_rows: int, error: type[Exception]
) -> None:
    update, init, options = UPDATES[name]
    param = np.ones(SHAPE)
    with pytest.raises(error):
        update(param, np.ones((grad_rows, 5)), init(param), rows=rows, **options)
