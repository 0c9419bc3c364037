from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gradient_checks import assert_close, assert_matches_finite_differences, leaf
from hypothesis import given, settings
from hypothesis import strategies as st

from ultramem_cuda import python_ref as ref

TORCH_ACTIVATIONS = {
    "identity": lambda a: a,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


@dataclass
class Case:
    indices: np.ndarray
    scores: np.ndarray
    values: np.ndarray
    pre_values: np.ndarray | None
    pre_input: np.ndarray | None
    activation: str
    addressing: ref.SlotAddressing | None
    sum_groups: bool

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        every = {
            "scores": self.scores,
            "pre_input": self.pre_input,
            "values": self.values,
            "pre_values": self.pre_values,
        }
        return {name: value for name, value in every.items() if value is not None}

    @property
    def options(self) -> dict:
        return {
            "activation": self.activation,
            "addressing": self.addressing,
            "sum_groups": self.sum_groups,
        }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_tokens, num_retrieved = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    num_cores, slice_width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    pre_dim = draw(st.integers(1, 7))
    num_slots = draw(st.integers(1, 9))  # few, so that slots repeat within a token
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    addressing = None
    if draw(st.booleans()):
        window, expand = draw(st.sampled_from([(1, 1), (1, 4), (4, 1), (4, 4), (5, 3)]))
        num_slots += window
        shuffles = [None, "permutation"] if (window, expand) == (5, 3) else [None, "feistel"]
        shuffle = draw(st.sampled_from(shuffles))
        if shuffle == "permutation":
            shuffle = rng.permutation(window * expand)
        offset = draw(st.integers(0, 20))
        addressing = ref.SlotAddressing(num_slots, window, offset, expand, shuffle, seed=5)
    limit = num_slots if addressing is None else addressing.window * addressing.expand
    with_pre = draw(st.booleans())
    return Case(
        indices=rng.integers(0, limit, (num_tokens, num_retrieved)),
        scores=rng.standard_normal((num_tokens, num_retrieved, num_cores)),
        values=rng.standard_normal((num_slots, num_cores * slice_width)),
        pre_values=rng.standard_normal((num_slots, pre_dim)) if with_pre else None,
        pre_input=rng.standard_normal((num_tokens, pre_dim)) if with_pre else None,
        activation=draw(st.sampled_from(["identity", "gelu", "silu"])),
        addressing=addressing,
        sum_groups=draw(st.booleans()),
    )


def torch_value_ffn(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same sum through one-hot matrices: of slots for the tables, of groups for the output."""
    values, scores = tensors["values"], tensors["scores"]
    slot, group, num_groups = case.indices, np.zeros_like(case.indices), 1
    if case.addressing is not None:
        fields = vars(case.addressing)
        slot, group = ref.slots(case.indices, **fields)
        num_groups = case.addressing.expand
    one_hot = torch.eye(values.shape[0], dtype=torch.float64)[torch.tensor(slot)]  # [T, S, N]
    hidden = torch.ones(slot.shape, dtype=torch.float64)
    if "pre_values" in tensors:
        retrieved = one_hot @ tensors["pre_values"]
        a = (retrieved @ tensors["pre_input"][:, :, None])[..., 0]
        hidden = TORCH_ACTIVATIONS[case.activation](a)
    slice_width = values.shape[1] // scores.shape[2]
    weights = (scores * hidden[..., None]).repeat_interleave(slice_width, dim=-1)
    contributions = weights * (one_hot @ values)
    if case.sum_groups:
        return contributions.sum(1)
    in_group = torch.eye(num_groups, dtype=torch.float64)[torch.tensor(group)]  # [T, S, E]
    return torch.einsum("tse,tsd->ted", in_group, contributions)


@settings(deadline=None, max_examples=80)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_forward_and_backward(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    out = ref.value_ffn(case.indices, **case.inputs, **case.options)
    tensors = {name: leaf(value) for name, value in case.inputs.items()}
    expected = torch_value_ffn(case, tensors)
    assert out.shape == expected.shape
    assert_close(out, expected)

    grad_out = rng.standard_normal(out.shape)
    expected.backward(torch.tensor(grad_out))
    gradients = ref.value_ffn_bwd(grad_out, case.indices, **case.inputs, **case.options)._asdict()
    for name, gradient in gradients.items():
        assert (gradient is None) == (name not in case.inputs)
    for name, tensor in tensors.items():
        assert_close(gradients[name], tensor.grad)

    names = list(case.inputs)

    def function(*arguments: np.ndarray) -> float:
        inputs = dict(zip(names, arguments, strict=True))
        return (ref.value_ffn(case.indices, **inputs, **case.options) * grad_out).sum()

    assert_matches_finite_differences(
        function, list(case.inputs.values()), [gradients[name] for name in names], rng
    )


@settings(deadline=None, max_examples=20)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_a_scale_is_a_multiplied_table(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 1.0, 2)
    multiplied = dict(case.inputs)
    for name, factor in zip(("values", "pre_values"), scale, strict=True):
        if name in multiplied:
            multiplied[name] = multiplied[name] * factor
    out = ref.value_ffn(case.indices, **multiplied, **case.options)
    scaled = {**case.inputs, **case.options, "table_scale": scale}
    np.testing.assert_array_equal(ref.value_ffn(case.indices, **scaled), out)
    grad_out = rng.standard_normal(out.shape)
    grads = ref.value_ffn_bwd(grad_out, case.indices, **multiplied, **case.options)
    for mine, theirs in zip(
        ref.value_ffn_bwd(grad_out, case.indices, **scaled), grads, strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ValueError, match=r"table_scale \(3,\) must be \[2\]"):
        ref.value_ffn(case.indices, **{**scaled, "table_scale": np.ones(3)})


def test_relu_is_torchs_and_passes_nothing_at_zero() -> None:
    pre_input = np.array([[-2.0], [0.0], [3.0]])
    inputs = {
        "scores": np.full((3, 1, 1), 5.0),
        "values": np.array([[7.0, 1.0]]),
        "pre_values": np.array([[1.0]]),
        "pre_input": pre_input,
    }
    indices = np.zeros((3, 1), np.int64)
    out = ref.value_ffn(indices, **inputs, activation="relu")
    np.testing.assert_array_equal(out, [[0, 0], [0, 0], [105, 15]])
    gradients = ref.value_ffn_bwd(np.ones((3, 2)), indices, **inputs, activation="relu")
    np.testing.assert_array_equal(gradients.pre_input, [[0], [0], [40]])
    np.testing.assert_array_equal(gradients.scores[:, 0, 0], [0, 0, 24])
    np.testing.assert_array_equal(gradients.values, [[15, 15]])
    np.testing.assert_array_equal(gradients.pre_values, [[120]])


def test_group_sums_add_up_to_the_sum_over_groups() -> None:
    rng = np.random.default_rng(0)
    addressing = ref.SlotAddressing(20, 16, 9, 4, "feistel", 1)
    arguments = (rng.integers(0, 64, (5, 12)), rng.standard_normal((5, 12, 2)))
    values = rng.standard_normal((20, 6))
    apart = ref.value_ffn(*arguments, values, addressing=addressing, sum_groups=False)
    together = ref.value_ffn(*arguments, values, addressing=addressing)
    assert apart.shape == (5, 4, 6)
    np.testing.assert_allclose(apart.sum(axis=1), together, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("addressing", [None, ref.SlotAddressing(5, 4, 3)])
@pytest.mark.parametrize("sum_groups", [True, False])
def test_indices_out_of_range_raise_or_contribute_zero(
    addressing: ref.SlotAddressing | None, sum_groups: bool
) -> None:
    rng = np.random.default_rng(0)
    limit = 5 if addressing is None else 4
    bad = np.array([[0, -1, 2], [limit, 1, 2**40]])
    good = np.array([[0, 0, 2], [0, 1, 0]])
    valid = np.array([[1, 0, 1], [0, 1, 0]])[..., None]
    inputs = {
        "scores": rng.standard_normal((2, 3, 2)),
        "values": rng.standard_normal((5, 4)),
        "pre_values": rng.standard_normal((5, 3)),
        "pre_input": rng.standard_normal((2, 3)),
    }
    options = {"addressing": addressing, "sum_groups": sum_groups, "activation": "gelu"}
    with pytest.raises(IndexError, match="indices"):
        ref.value_ffn(bad, **inputs, **options)
    out = ref.value_ffn(bad, **inputs, **options, out_of_range="zero")
    masked = inputs | {"scores": inputs["scores"] * valid}
    np.testing.assert_allclose(out, ref.value_ffn(good, **masked, **options), rtol=1e-14)

    grad_out = rng.standard_normal(out.shape)
    with pytest.raises(IndexError, match="indices"):
        ref.value_ffn_bwd(grad_out, bad, **inputs, **options)
    gradients = ref.value_ffn_bwd(grad_out, bad, **inputs, **options, out_of_range="zero")
    expected = ref.value_ffn_bwd(grad_out, good, **masked, **options)
    np.testing.assert_allclose(gradients.scores, expected.scores * valid, rtol=1e-14)
    for name in ("pre_input", "values", "pre_values"):
        np.testing.assert_allclose(
            getattr(gradients, name), getattr(expected, name), rtol=1e-13, atol=1e-15
        )


def test_rows_that_nobody_read_have_no_part_in_anything() -> None:
    rng = np.random.default_rng(0)
    values, pre_values = rng.standard_normal((4, 3)), rng.standard_normal((4, 2))
    values[2], pre_values[2] = np.nan, np.inf
    indices = np.array([[0, 3, 3], [-5, 1, 0]])
    arguments = (indices, rng.standard_normal((2, 3, 1)), values, pre_values, np.ones((2, 2)))
    out = ref.value_ffn(*arguments, out_of_range="zero")
    assert np.isfinite(out).all()
    gradients = ref.value_ffn_bwd(np.ones_like(out), *arguments, out_of_range="zero")
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    assert (gradients.values[2] == 0).all()
    assert (gradients.pre_values[2] == 0).all()


def test_nan_stays_in_its_token_and_group() -> None:
    addressing = ref.SlotAddressing(4, 4, 0, 2)
    values = np.ones((4, 2))
    values[1] = np.nan
    out = ref.value_ffn(
        [[1, 6], [0, 6]], np.ones((2, 2, 1)), values, addressing=addressing, sum_groups=False
    )
    assert np.isnan(out[0, 0]).all()
    np.testing.assert_array_equal(out[0, 1], [1, 1])
    np.testing.assert_array_equal(out[1], [[1, 1], [1, 1]])


@pytest.mark.parametrize("activation", ["identity", "gelu", "relu", "silu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_non_finite_inputs_neither_crash_nor_warn(activation: str, value: float) -> None:
    pre_input = np.array([[value, 1.0], [1.0, 1.0]])
    arguments = ([[0, 1]] * 2, np.ones((2, 2, 1)), np.ones((2, 3)), np.ones((2, 2)), pre_input)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = ref.value_ffn(*arguments, activation=activation)
        ref.value_ffn_bwd(np.ones_like(out), *arguments, activation=activation)
    assert np.isfinite(out[1]).all()


INDICES, SCORES, VALUES = np.zeros((2, 3), np.int64), np.ones((2, 3, 2)), np.ones((5, 4))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((INDICES.astype(float), SCORES, VALUES), {}, TypeError, "indices"),
        ((INDICES[0], SCORES, VALUES), {}, ValueError, "indices"),
        ((INDICES, SCORES[:, :2], VALUES), {}, ValueError, "scores"),
        ((INDICES, SCORES, VALUES[:, :3]), {}, ValueError, "multiple of C"),
        ((INDICES, SCORES, VALUES, np.ones((5, 2))), {}, ValueError, "together"),
        ((INDICES, SCORES, VALUES, np.ones((4, 2)), np.ones((2, 2))), {}, ValueError, "pre_values"),
        ((INDICES, SCORES, VALUES, np.ones((5, 2)), np.ones((2, 3))), {}, ValueError, "pre_input"),
        ((INDICES, SCORES, VALUES), {"activation": "tanh"}, ValueError, "activation"),
        ((INDICES, SCORES, VALUES), {"out_of_range": "wrap"}, ValueError, "out_of_range"),
        (
            (INDICES, SCORES, VALUES),
            {"addressing": ref.SlotAddressing(6, 4)},
            ValueError,
            "addressing",
        ),
    ],
)
def test_bad_arguments_raise(
    arguments: tuple, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ref.value_ffn(*arguments, **options)
