"""Shared assertions of the tests: an operator against the float64 reference on rounded inputs.

Gradients are judged by relative L2 error, cosine, signed bias and missing rows; a selection by the
band within which float32 cannot tell two ranks apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref

# The bounds that users are shown are those that the tests hold.
from ultramem_cuda.cli.check import FORWARD_BOUND, GRADIENT_BOUND, SCORE_BOUND

# float32 sums of more terms than this are allowed 3e-6.
LONG_SUM, LONG_SUM_BOUND = 2048, 3e-6
# Rows of a gradient that may be zero in only one of the two, relative to the largest.
NEGLIGIBLE_ROW = 1e-6
# Slots in a selection that may differ from the reference within the error band: a share of those
# kept, and a few in any case.
BAND_SHARE, BAND_FEW = 1e-3, 2


@dataclasses.dataclass
class BandUse:
    """Kept slots compared, and those that differed within the band, over the whole session."""

    kept: int = 0
    band_used: int = 0

    def add(self, kept: int, band_used: int) -> None:
        self.kept += kept
        self.band_used += band_used


BAND_USE: defaultdict[str, BandUse] = defaultdict(BandUse)


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def array(tensor: Tensor) -> np.ndarray:
    """The values of a tensor in float64; integers as they are."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


class Data:
    """Random tensors from one seed, drawn on the CPU so that all devices get the same numbers."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        requires_grad: bool = False,
    ) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype).requires_grad_(requires_grad)

    def gains(
        self, size: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False
    ) -> Tensor:
        """Gains of a norm, 0.5 to 1.5."""
        values = torch.rand(size, generator=self.generator, dtype=torch.float64) + 0.5
        return values.to(self.device, dtype).requires_grad_(requires_grad)

    def cores(
        self,
        num_cores: int,
        num_heads: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
    ) -> Tensor:
        """Tucker cores, U(0, 1) as the layer initialises them."""
        shape = (num_cores, num_heads, rank, rank)
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, dtype).requires_grad_(requires_grad)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device, dtype)


def scalar_gradients(
    output: Tensor, weights: Tensor, inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of sum(output * weights), None for inputs that are None."""
    present = [tensor for tensor in inputs if tensor is not None]
    grads = iter(torch.autograd.grad(output, present, weights))
    return [None if tensor is None else next(grads) for tensor in inputs]


def proper_subsets(*names: str) -> list[tuple[str, ...]]:
    """All but the empty set and the whole."""
    return [
        subset for size in range(1, len(names)) for subset in itertools.combinations(names, size)
    ]


def check_only_some_train(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], trained: tuple[str, ...]
) -> None:
    """Where some inputs want no gradient, the others' are bit for bit what they are otherwise."""
    function(**inputs).square().sum().backward()
    wanted = {name: tensor.grad for name, tensor in inputs.items()}
    for name, tensor in inputs.items():
        tensor.grad = None
        tensor.requires_grad_(name in trained)
    function(**inputs).square().sum().backward()
    for name, tensor in inputs.items():
        if name in trained:
            assert torch.equal(tensor.grad, wanted[name]), name
        else:
            assert tensor.grad is None, name


# ---- judging values ------------------------------------------------------------------------------


def error_size(expected: np.ndarray, random_size: np.ndarray | None) -> float:
    """What an error is relative to: ||expected||, or what it would be with random signs if larger.

    A handful of outputs can cancel to almost nothing by chance, which says nothing about the
    arithmetic. random_size holds the root of the sum of the squared terms of each output; in a
    tensor of many outputs the two norms agree.
    """
    size = float(np.linalg.norm(expected.ravel()))
    if random_size is not None:
        size = max(size, float(np.linalg.norm(random_size.ravel())))
    return size


def check_close(
    name: str,
    actual: Tensor,
    expected: np.ndarray,
    bound: float,
    random_size: np.ndarray | None = None,
) -> None:
    """Relative L2 error within the bound; see error_size for relative to what."""
    assert tuple(actual.shape) == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    size = error_size(expected, random_size)
    error = float(np.linalg.norm((array(actual) - expected).ravel()))
    assert error <= bound * size, f"{name}: relative L2 error {error / size:.2e} > {bound:.1e}"


def check_gradient(
    name: str,
    actual: Tensor | None,
    expected: np.ndarray,
    random_size: np.ndarray | None = None,
    *,
    bound: float | None = None,
) -> None:
    """Relative L2 error, cosine, signed bias and missing rows of a gradient.

    The bias of n independent errors within the bound e is e / sqrt(n); four times that is allowed
    with the errors of a row held to have one cause, and a tenth of the bound in any case. Rounding
    to bfloat16 by truncation has a bias of 1.4e-3 at least, and is caught. A row that is
    zero in only one of the two may be there if it is below a millionth of the largest: gelu of -6
    is zero in float32, and duplicates of a slot can cancel but for rounding.
    """
    assert actual is not None, f"{name}: no gradient"
    bound = GRADIENT_BOUND[actual.dtype] if bound is None else bound
    check_close(name, actual, expected, bound, random_size)
    values = array(actual)
    norm = float(np.linalg.norm(expected.ravel()))
    if norm == 0.0:
        assert not values.any(), f"{name}: must be zero"
        return
    relative_bound = bound * error_size(expected, random_size) / norm
    cosine = ref.cosine(values, expected)
    assert cosine >= 1.0 - relative_bound**2 - 1e-13, f"{name}: cosine is 1 - {1 - cosine:.1e}"
    rows = (-1, expected.shape[-1]) if expected.ndim > 1 else (-1, 1)
    values, expected = values.reshape(rows), expected.reshape(rows)
    sizes = np.linalg.norm(expected, axis=1)
    bias = ref.signed_bias(values, expected)
    bias_bound = relative_bound * max(0.1, min(1.0, 4.0 / np.sqrt(np.count_nonzero(sizes))))
    assert abs(bias) <= bias_bound, f"{name}: signed bias {bias:.1e}, at most {bias_bound:.1e}"
    missing = ref.missing_rows(values, expected)
    one_size = np.maximum(sizes, np.linalg.norm(values, axis=1))[missing]
    missing = missing[one_size > NEGLIGIBLE_ROW * sizes.max()]
    assert missing.size == 0, f"{name}: rows {missing[:8]} are zero in only one of the two"


def check_zero_gradients(tensors: Sequence[Tensor | None]) -> None:
    """Gradients that exist, have their tensor's shape and dtype, and are zero."""
    for tensor in tensors:
        if tensor is not None:
            assert tensor.grad is not None
            assert tensor.grad.shape == tensor.shape
            assert tensor.grad.dtype == tensor.dtype
            assert not tensor.grad.any()


def root(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else np.sqrt(x)


def square(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else np.square(x)


# ---- product_key_topk ----------------------------------------------------------------------------


def check_product_key_topk(
    query: Tensor,
    keys: Tensor,
    core: Tensor | None,
    *,
    topk: int,
    axis_topk: int | None = None,
    mode: str = "tucker",
    key_norm_weight: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Kept sets, scores at the kept slots, and all gradients; returns (scores, indices).

    The reference gets what the operator says it uses: keys normalised and rounded to their dtype,
    the core in the accumulation dtype. Its scores and gradients are those of the operator's slots.
    """
    acc = accumulation_dtype(query.dtype)
    leaves = [query, keys, core, key_norm_weight]
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    scores, indices = ops.product_key_topk(
        leaves[0],
        leaves[1],
        leaves[2],
        topk=topk,
        axis_topk=axis_topk,
        key_norm_weight=leaves[3],
        mode=mode,
    )
    num_cores = 1 if core is None else core.shape[0]
    shape = (query.shape[0], query.shape[2], topk)
    assert scores.dtype == acc
    assert scores.shape == (*shape, num_cores)
    assert indices.dtype == torch.int64
    assert indices.shape == shape

    normed = keys if key_norm_weight is None else ops.rms_norm(keys, key_norm_weight)
    q, k = array(query), array(normed)
    c = None if core is None else array(core.to(acc))
    kept = array(indices)
    check_selection(query.device.type, q, k, c, kept, topk, axis_topk, mode, acc)
    check_close(
        "scores",
        scores,
        ref.product_key_scores_at(q, k, c, kept, mode),
        SCORE_BOUND[query.dtype],
        root(ref.product_key_scores_at(q**2, k**2, square(c), kept, mode)),
    )

    upstream = Data(seed, query.device.type).normal(*scores.shape, dtype=acc)
    grads = scalar_gradients(scores, upstream, leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf is None or grad.dtype == leaf.dtype
    g = array(upstream)
    expected = ref.product_key_topk_bwd(g, q, k, c, kept, mode=mode)
    sizes = ref.product_key_topk_bwd(g**2, q**2, k**2, square(c), kept, mode=mode)
    check_gradient("grad_query", grads[0], expected[0], root(sizes[0]))
    if core is not None:
        check_gradient("grad_core", grads[2], expected[2], root(sizes[2]))
    if key_norm_weight is None:
        check_gradient("grad_keys", grads[1], expected[1], root(sizes[1]))
    else:
        weight = array(key_norm_weight)
        grad_keys, grad_weight = ref.rms_norm_bwd(expected[1], array(keys), weight)
        check_gradient("grad_keys", grads[1], grad_keys)
        # The gradient of the normalised keys is rounded to their dtype on the way.
        bound = max(GRADIENT_BOUND[keys.dtype], GRADIENT_BOUND[key_norm_weight.dtype])
        check_gradient("grad_key_norm_weight", grads[3], grad_weight, bound=bound)
    return scores.detach(), indices


def check_selection(
    device: str,
    query: np.ndarray,
    keys: np.ndarray,
    core: np.ndarray | None,
    indices: np.ndarray,
    topk: int,
    axis_topk: int | None,
    mode: str,
    acc: torch.dtype,
) -> None:
    """The kept slots are the reference's, but for those within the error band, which is counted."""
    expected = ref.product_key_topk(query, keys, core, topk=topk, axis_topk=axis_topk, mode=mode)
    # In float64 the reference rounds as much as the operator does.
    unit = float(np.finfo(np.float32).eps) if acc == torch.float32 else 2 * np.finfo(float).eps
    comparison = ref.compare_kept_sets(
        expected,
        indices,
        axis_band=ref.axis_band(query, keys, expected.axis_filter, unit=unit),
        grid_band=ref.grid_band(query, keys, core, unit=unit),
    )
    assert not comparison.violations, "\n".join(comparison.violations[:5])
    BAND_USE[device].add(comparison.kept, comparison.band_used)
    allowed = max(BAND_FEW, BAND_SHARE * comparison.kept)
    assert comparison.band_used <= allowed, (
        f"{comparison.band_used} of {comparison.kept} slots differ within the error band"
    )


# ---- value_ffn -----------------------------------------------------------------------------------


def check_value_ffn(
    indices: Tensor,
    scores: Tensor,
    values: Tensor,
    pre_values: Tensor | None = None,
    pre_input: Tensor | None = None,
    *,
    activation: str = "identity",
    addressing: Any = None,
    sum_groups: bool = True,
    seed: int = 0,
) -> Tensor:
    """The output and all gradients against the reference; returns the output."""
    acc = accumulation_dtype(values.dtype)
    leaves = [scores, values, pre_values, pre_input]
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    options = {"activation": activation, "sum_groups": sum_groups}
    out = ops.value_ffn(indices, *leaves, addressing=addressing, **options)
    assert out.dtype == (values if pre_input is None else pre_input).dtype

    where = None if addressing is None else addressing.to("cpu")
    inputs = [array(scores.to(acc)), array(values)]
    inputs += [None if x is None else array(x) for x in (pre_values, pre_input)]
    # With random signs; |act(a)| <= |a|, so that identity bounds the other activations.
    squares = [square(x) for x in inputs]
    plain = {"sum_groups": sum_groups, "addressing": where}
    slots = array(indices)
    bound = FORWARD_BOUND[out.dtype]
    terms = max(indices.shape[1], 0 if pre_values is None else pre_values.shape[1])
    if out.dtype == torch.float32 and terms > LONG_SUM:
        bound = LONG_SUM_BOUND
    expected = ref.value_ffn(slots, *inputs, addressing=where, **options)
    check_close("out", out, expected, bound, root(ref.value_ffn(slots, *squares, **plain)))

    upstream = Data(seed, values.device.type).normal(*out.shape, dtype=out.dtype)
    grads = scalar_gradients(out, upstream, leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf is None or grad.dtype == leaf.dtype
    g = array(upstream)
    expected_grads = ref.value_ffn_bwd(g, slots, *inputs, addressing=where, **options)
    sizes = ref.value_ffn_bwd(g**2, slots, *squares, **plain)
    check_gradient("grad_scores", grads[0], expected_grads.scores, root(sizes.scores))
    check_gradient("grad_values", grads[1], expected_grads.values, root(sizes.values))
    if pre_values is not None:
        check_gradient(
            "grad_pre_values", grads[2], expected_grads.pre_values, root(sizes.pre_values)
        )
        check_gradient("grad_pre_input", grads[3], expected_grads.pre_input, root(sizes.pre_input))
    return out.detach()


# ---- CUDA ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """What would wait for the GPU raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ---- other processes -----------------------------------------------------------------------------


def run_python(
    code: str, *, env: dict[str, str] | None = None, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that imports what this one imports; checks nothing."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
