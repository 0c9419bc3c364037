"""A weighted sum over the retrieved slots, each an FFN of inner width one.

PEER (arXiv 2407.04153) makes a slot a pair of a pre-value p and a value v. UltraMemV2 (arXiv
2508.18756):

    o = W^T V^T (act(P x) * s_hat)                       (equation 13; V2 takes act = identity,
    equation 15)

Without pre-values act(P x) = 1, and this is the weighted sum of PKM's equation 5, o = sum_i s_i
V_i. With C cores, core c weights the c-th of C equal slices of the value (multi-core scoring). The
linear W belongs to the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ._arrays import FloatArray, IntArray, f64, i64, non_finite_ok, scatter_add_rows
from .addressing import Addressing, slots

Activation = Literal["identity", "gelu", "relu", "silu"]
OutOfRange = Literal["raise", "zero"]


class ValueFFNGrads(NamedTuple):
    """Gradients of value_ffn, each shaped like its input; None where the input was absent."""

    scores: FloatArray
    pre_input: FloatArray | None
    values: FloatArray
    pre_values: FloatArray | None


@non_finite_ok
def value_ffn(
    indices: npt.ArrayLike,
    scores: npt.ArrayLike,
    values: npt.ArrayLike,
    pre_values: npt.ArrayLike | None = None,
    pre_input: npt.ArrayLike | None = None,
    *,
    activation: Activation = "identity",
    addressing: Addressing | None = None,
    sum_groups: bool = True,
    table_scale: npt.ArrayLike | None = None,
    out_of_range: OutOfRange = "raise",
) -> FloatArray:
    """out = sum_s concat_c(h_s g_{s,c} V[slot_s, slice c]), h_s = act(<pre_input, P[slot_s]>).

    indices [T, S]; scores [T, S, C]; values [N, Dv], C divides Dv; pre_values [N, Dp] and pre_input
    [T, Dp], both or neither (h = 1). Without addressing an index is a row of the table; with it
    slots() gives the row and one of E groups. Returns [T, Dv], or with sum_groups=False [T, E, Dv],
    a sum a group, which the first UltraMem projects each by its own W_p (equation 9). With
    table_scale [2], V is values * table_scale[0] and P pre_values * table_scale[1].

    Raises ValueError where shapes do not fit. An index out of range raises IndexError, or
    contributes zero with out_of_range="zero".
    """
    values, pre_values = _scaled(values, pre_values, table_scale)
    a = _Arguments.checked(
        indices, scores, values, pre_values, pre_input, activation, addressing, out_of_range
    )
    contributions = a.weights()[..., None] * a.value_slices()  # [T, S, C, Dv / C]
    contributions = np.where(a.valid[:, :, None, None], contributions, 0.0)
    contributions = contributions.reshape(*a.slot.shape, a.values.shape[1])
    if sum_groups:
        return contributions.sum(axis=1)
    in_group = a.group[:, None, :] == np.arange(a.num_groups)[:, None]  # [T, E, S]
    return np.where(in_group[..., None], contributions[:, None], 0.0).sum(axis=2)


@non_finite_ok
def value_ffn_bwd(
    grad_out: npt.ArrayLike,
    indices: npt.ArrayLike,
    scores: npt.ArrayLike,
    values: npt.ArrayLike,
    pre_values: npt.ArrayLike | None = None,
    pre_input: npt.ArrayLike | None = None,
    *,
    activation: Activation = "identity",
    addressing: Addressing | None = None,
    sum_groups: bool = True,
    table_scale: npt.ArrayLike | None = None,
    out_of_range: OutOfRange = "raise",
) -> ValueFFNGrads:
    """Gradients of value_ffn, tables dense: (scores, pre_input, values, pre_values).

    grad_out G [T, Dv], or [T, E, Dv] with sum_groups=False, where G_s = G[:, group_s]. With a the
    pre-activation, h = act(a) and the weight w_c = h g_c:

        dw_c = <G_s[slice c], V[slot, slice c]>
        dg_c = h dw_c
        da   = act'(a) sum_c g_c dw_c
        dpre_input         = sum_s da P[slot]
        dP[slot]          += da pre_input
        dV[slot, slice c] += w_c G_s[slice c]

    With table_scale, V and P, and the gradients of the tables, are those of the scaled tables.
    """
    values, pre_values = _scaled(values, pre_values, table_scale)
    a = _Arguments.checked(
        indices, scores, values, pre_values, pre_input, activation, addressing, out_of_range
    )
    retrieved = a.value_slices()  # [T, S, C, Dv / C]
    grad = f64(grad_out)
    if sum_groups:
        grad_slot = np.broadcast_to(grad[:, None, :], (*a.slot.shape, a.values.shape[1]))
    else:
        grad_slot = np.take_along_axis(grad, a.group[:, :, None], axis=1)
    grad_slot = grad_slot.reshape(retrieved.shape)

    rows = a.slot[a.valid]
    grad_weights = (grad_slot * retrieved).sum(axis=-1)  # dw [T, S, C]
    grad_scores = np.where(a.valid[..., None], a.hidden[..., None] * grad_weights, 0.0)
    weighted_grad = (a.weights()[..., None] * grad_slot).reshape(*a.slot.shape, a.values.shape[1])
    grad_values = scatter_add_rows(a.values.shape[0], rows, weighted_grad[a.valid])
    if a.pre_values is None or a.pre_input is None:
        return ValueFFNGrads(grad_scores, None, grad_values, None)

    _, derivative = ACTIVATIONS[activation]
    grad_pre = derivative(a.pre_activation) * (a.scores * grad_weights).sum(axis=-1)  # da [T, S]
    pulled = np.where(
        a.valid[..., None], grad_pre[..., None] * a.pre_values[a.slot], 0.0
    )  # [T, S, Dp]
    pushed = grad_pre[..., None] * a.pre_input[:, None, :]  # [T, S, Dp]
    grad_pre_values = scatter_add_rows(a.pre_values.shape[0], rows, pushed[a.valid])
    return ValueFFNGrads(grad_scores, pulled.sum(axis=1), grad_values, grad_pre_values)


def _scaled(
    values: npt.ArrayLike, pre_values: npt.ArrayLike | None, table_scale: npt.ArrayLike | None
) -> tuple[npt.ArrayLike, npt.ArrayLike | None]:
    if table_scale is None:
        return values, pre_values
    scale = f64(table_scale)
    if scale.shape != (2,):
        raise ValueError(f"value_ffn: table_scale {scale.shape} must be [2]")
    return f64(values) * scale[0], None if pre_values is None else f64(pre_values) * scale[1]


@dataclass(frozen=True)
class _Arguments:
    """value_ffn's arguments, checked, and what forward and backward both need of them."""

    slot: IntArray  # [T, S] row of the table; 0 where not valid
    group: IntArray  # [T, S]
    valid: npt.NDArray[np.bool_]  # [T, S] the index was in range
    num_groups: int
    scores: FloatArray  # [T, S, C]
    values: FloatArray  # [N, Dv]
    pre_values: FloatArray | None  # [N, Dp]
    pre_input: FloatArray | None  # [T, Dp]
    pre_activation: FloatArray  # [T, S] a
    hidden: FloatArray  # [T, S] h

    @classmethod
    def checked(
        cls,
        indices: npt.ArrayLike,
        scores: npt.ArrayLike,
        values: npt.ArrayLike,
        pre_values: npt.ArrayLike | None,
        pre_input: npt.ArrayLike | None,
        activation: Activation,
        addressing: Addressing | None,
        out_of_range: OutOfRange,
    ) -> _Arguments:
        indices, scores, values = i64(indices, "indices"), f64(scores), f64(values)
        if indices.ndim != 2 or scores.ndim != 3 or scores.shape[:2] != indices.shape:
            raise ValueError(
                f"value_ffn: indices {indices.shape} must be [T, S] and "
                f"scores {scores.shape} [T, S, C]"
            )
        if values.ndim != 2 or scores.shape[2] == 0 or values.shape[1] % scores.shape[2]:
            raise ValueError(
                f"value_ffn: values {values.shape} must be [N, Dv], Dv a multiple of "
                f"C = {scores.shape[2]}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"value_ffn: activation must be one of {list(ACTIVATIONS)}, got {activation!r}"
            )
        if out_of_range not in ("raise", "zero"):
            raise ValueError(
                f"value_ffn: out_of_range must be 'raise' or 'zero', got {out_of_range!r}"
            )

        slot, group, valid, num_groups = _address(
            indices, values.shape[0], addressing, out_of_range
        )
        if pre_values is None and pre_input is None:
            ones = np.ones(indices.shape)
            return cls(slot, group, valid, num_groups, scores, values, None, None, ones, ones)
        if pre_values is None or pre_input is None:
            raise ValueError("value_ffn: pre_values and pre_input must be given together")
        pre_values, pre_input = f64(pre_values), f64(pre_input)
        expected = (values.shape[0], indices.shape[0], pre_values.shape[-1])
        if (*pre_values.shape[:-1], *pre_input.shape) != expected:
            raise ValueError(
                f"value_ffn: pre_values {pre_values.shape} and pre_input {pre_input.shape} must be "
                f"[{values.shape[0]}, Dp] and [{indices.shape[0]}, Dp]"
            )
        pre_activation = np.einsum("td,tsd->ts", pre_input, pre_values[slot])
        hidden = ACTIVATIONS[activation][0](pre_activation)
        return cls(
            slot,
            group,
            valid,
            num_groups,
            scores,
            values,
            pre_values,
            pre_input,
            pre_activation,
            hidden,
        )

    def weights(self) -> FloatArray:
        """w_c = h g_c, [T, S, C]."""
        return self.hidden[..., None] * self.scores

    def value_slices(self) -> FloatArray:
        """Retrieved values by core, [T, S, C, Dv / C]."""
        slice_width = self.values.shape[1] // self.scores.shape[2]
        return self.values[self.slot].reshape(*self.scores.shape, slice_width)


def _address(
    indices: IntArray, table_rows: int, addressing: Addressing | None, out_of_range: OutOfRange
) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_], int]:
    """(slot, group, valid, number of groups); slot and group are 0 where not valid."""
    if addressing is not None and addressing.num_slots != table_rows:
        raise ValueError(
            f"value_ffn: addressing is for {addressing.num_slots} slots, values have {table_rows}"
        )
    limit = table_rows if addressing is None else addressing.expand * addressing.window
    valid = (indices >= 0) & (indices < limit)
    if out_of_range == "raise" and not valid.all():
        raise IndexError(f"value_ffn: indices must lie in [0, {limit})")
    in_range = np.where(valid, indices, 0)
    if addressing is None:
        return in_range, np.zeros_like(in_range), valid, 1
    slot, group = slots(
        in_range,
        num_slots=addressing.num_slots,
        window=addressing.window,
        offset=addressing.offset,
        expand=addressing.expand,
        shuffle=addressing.shuffle,
        seed=addressing.seed,
    )
    return slot, group, valid, addressing.expand


def _erf(a: FloatArray) -> FloatArray:
    # numpy has none; math's is correct to the last bit or two.
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(a), dtype=np.float64)


def _sigmoid(a: FloatArray) -> FloatArray:
    sigmoid: FloatArray = 1.0 / (1.0 + np.exp(-a))
    return sigmoid


def _gelu(a: FloatArray) -> FloatArray:
    """a Phi(a), Phi the normal distribution function: the erf form."""
    return a * 0.5 * (1.0 + _erf(a / math.sqrt(2.0)))


def _gelu_derivative(a: FloatArray) -> FloatArray:
    """Phi(a) + a phi(a)."""
    density = np.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi)
    derivative: FloatArray = 0.5 * (1.0 + _erf(a / math.sqrt(2.0))) + a * density
    return derivative


def _silu(a: FloatArray) -> FloatArray:
    return a * _sigmoid(a)


def _silu_derivative(a: FloatArray) -> FloatArray:
    sigmoid = _sigmoid(a)
    return sigmoid * (1.0 + a * (1.0 - sigmoid))


def _relu(a: FloatArray) -> FloatArray:
    return np.maximum(a, 0.0)


def _relu_derivative(a: FloatArray) -> FloatArray:
    """Zero at zero, as frameworks take it; a NaN passes."""
    return np.where(a <= 0, 0.0, 1.0)


def _identity(a: FloatArray) -> FloatArray:
    return a


# name: (act, act')
ACTIVATIONS: dict[
    str, tuple[Callable[[FloatArray], FloatArray], Callable[[FloatArray], FloatArray]]
] = {
    "identity": (_identity, np.ones_like),
    "gelu": (_gelu, _gelu_derivative),
    "relu": (_relu, _relu_derivative),
    "silu": (_silu, _silu_derivative),
}
