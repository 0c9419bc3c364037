"""``ultramem check``: every operator and gradient, in every dtype, against the NumPy reference.

The inputs are rounded to the dtype first and given to the reference in float64, so that what is
measured is the operator's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import ultramem_cuda.python_ref as ref

from .. import _library, ops
from ..addressing import SlotAddressing
from ..examples.lm.arguments import resolve_device
from ..examples.lm.errors import UsageError
from ..factors import GradientFactors
from ..optim import MemoryAdagrad, MemoryAdam, MemorySGD, clip_grad_norm_
from ..optim.memory import MemoryOptimizer
from ..python_ref.product_key import Mode
from ..python_ref.value_ffn import Activation
from ..table import MemoryTable

Array = npt.NDArray[np.float64]

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = CPU_DTYPES[1:]

# Relative L2 errors against a float64 reference of rounded inputs, by the dtype of the result (of
# scores: of the inputs). A result in a narrow type carries one rounding of its own.
FORWARD_BOUND = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
SCORE_BOUND = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}
GRADIENT_BOUND = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 1.25e-3,
}


@dataclass(frozen=True)
class Comparison:
    """One number against its bound. ``error`` is a relative L2 error, or a count of wrong slots."""

    device: str
    operator: str
    dtype: str
    quantity: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """False for NaN, too."""
        return self.error <= self.bound


def run(device: str | None, seed: int) -> int:
    """Prints the table; 0 if every error is within its bound, else 1."""
    _require_library()
    rows = compare(devices(device), seed)
    print(render(rows))
    print(summary(rows))
    return 0 if all(row.ok for row in rows) else 1


def devices(name: str | None) -> list[torch.device]:
    """What is checked: the device asked for, else the CPU and, with kernels for it, the GPU."""
    if name is not None:
        return [resolve_device(name)]
    found = [torch.device("cpu")]
    if torch.cuda.is_available() and _library.has_cuda_kernels():
        found.append(torch.device("cuda"))
    return found


def compare(on: Iterable[torch.device], seed: int = 0) -> list[Comparison]:
    """All comparisons on these devices."""
    rows: list[Comparison] = []
    for device in on:
        for dtype in CUDA_DTYPES if device.type == "cuda" else CPU_DTYPES:
            for operator, cases in _OPERATORS.items():
                bench = _Bench(device, dtype, np.random.default_rng(seed))
                rows.extend(
                    Comparison(device.type, operator, _name(dtype), quantity, error, bound)
                    for quantity, error, bound in cases(bench)
                )
    return rows


def render(rows: Sequence[Comparison]) -> str:
    """The comparisons as a text table."""
    width = max(len(row.operator) for row in rows)
    quantity = max(len(row.quantity) for row in rows)
    head = (
        f"{'device':<6} {'operator':<{width}} {'dtype':<8} {'quantity':<{quantity}} error    bound"
    )
    lines = [head]
    for row in rows:
        lines.append(
            f"{row.device:<6} {row.operator:<{width}} {row.dtype:<8} {row.quantity:<{quantity}} "
            f"{row.error:<8.1e} {row.bound:<8.1e} {'' if row.ok else 'FAILED'}".rstrip()
        )
    return "\n".join(lines)


def summary(rows: Sequence[Comparison]) -> str:
    """One line on all of them."""
    failed = sum(not row.ok for row in rows)
    where = " and ".join(dict.fromkeys(row.device for row in rows))
    if failed:
        return f"check: {failed} of {len(rows)} comparisons on {where} FAILED"
    return f"check: all {len(rows)} comparisons on {where} are within their bounds"


def _require_library() -> None:
    if not _library.is_loaded():
        raise UsageError("check", str(_library.load_error()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


Result = tuple[str, float, float]


class _Bench:
    """Draws inputs for one device and dtype and judges results."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, generator: np.random.Generator
    ) -> None:
        self.device = device
        self.dtype = dtype
        # Cores, gains and scores: fp32, or fp64 beside fp64.
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = generator

    def normal(self, *shape: int, wide: bool = False) -> Tensor:
        """A leaf that requires a gradient, standard normal, rounded to its dtype."""
        return self._leaf(self.generator.standard_normal(shape), wide)

    def uniform(self, *shape: int) -> Tensor:
        """A wide leaf drawn from U(0, 1): cores."""
        return self._leaf(self.generator.random(shape), True)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 indices in [0, high)."""
        return torch.from_numpy(self.generator.integers(high, size=shape)).to(self.device)

    def _leaf(self, values: Array, wide: bool) -> Tensor:
        dtype = self.wide if wide else self.dtype
        return torch.from_numpy(values).to(self.device, dtype).requires_grad_()

    def upstream(self, output: Tensor) -> Tensor:
        """A gradient to send into ``output``."""
        values = torch.from_numpy(self.generator.standard_normal(tuple(output.shape)))
        return values.to(output.device, output.dtype)

    def forward(self, quantity: str, actual: Tensor, expected: Array) -> Result:
        """Judges an output by the rounding of its own dtype."""
        return quantity, ref.relative_l2(array(actual), expected), FORWARD_BOUND[actual.dtype]

    def score(self, quantity: str, actual: Tensor, expected: Array) -> Result:
        """Judges fp32 scores made of inputs in the bench's dtype."""
        return quantity, ref.relative_l2(array(actual), expected), SCORE_BOUND[self.dtype]

    def gradients(
        self,
        names: Sequence[str],
        leaves: Sequence[Tensor],
        expected: Sequence[Array | None],
        made_of: torch.dtype | None = None,
    ) -> Iterator[Result]:
        """Judges the gradients that a backward pass left in ``leaves``, by their dtype.

        ``made_of`` is the dtype of what they are computed from, where that is a rounded result.
        """
        for name, leaf, right in zip(names, leaves, expected, strict=True):
            if leaf.grad is None or right is None:
                error = float("inf")
            else:
                error = ref.relative_l2(array(leaf.grad), right)
            yield f"grad {name}", error, GRADIENT_BOUND[made_of or leaf.dtype]


def array(tensor: Tensor) -> Array:
    """A tensor's values, exactly, in float64."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def _rms_norm(bench: _Bench) -> Iterator[Result]:
    x, weight = bench.normal(33, 40), bench.normal(40, wide=True)
    y = ops.rms_norm(x, weight)
    upstream = bench.upstream(y)
    y.backward(upstream)
    yield bench.forward("y", y, ref.rms_norm(array(x), array(weight)))
    expected = ref.rms_norm_bwd(array(upstream), array(x), array(weight))
    yield from bench.gradients(("x", "weight"), (x, weight), expected)


def _tucker_query(bench: _Bench) -> Iterator[Result]:
    heads, queries, key_dim, d_model = 2, 2, 20, 48
    x = bench.normal(33, d_model)
    weight = bench.normal(2 * heads * queries * key_dim, d_model)
    gain = bench.normal(key_dim, wide=True)
    query = ops.tucker_query(x, weight, gain, num_heads=heads)
    upstream = bench.upstream(query)
    query.backward(upstream)
    arguments = array(x), array(weight), array(gain), heads
    yield bench.forward("query", query, ref.tucker_query(*arguments))
    expected = ref.tucker_query_bwd(array(upstream), *arguments)
    yield from bench.gradients(("x", "weight"), (x, weight), expected[:2])
    # The gain's gradient is made of the projection, which is kept in the dtype of x.
    yield from bench.gradients(("norm_weight",), (gain,), expected[2:], made_of=bench.dtype)


def _tucker_filter(bench: _Bench) -> Iterator[Result]:
    if bench.dtype != bench.wide:
        return  # The core is used in fp32 whatever the model's dtype.
    core = bench.uniform(2, 2, 3, 3)
    u, t, sigma = ops.tucker_filter(core)
    upstream = bench.upstream(sigma)
    sigma.backward(upstream)
    expected = ref.tucker_filter(array(core))
    for quantity, actual, right in zip(("u", "t", "sigma"), (u, t, sigma), expected, strict=True):
        yield bench.forward(quantity, actual, right)
    grad_core = ref.tucker_filter_bwd(array(upstream), array(core))
    yield from bench.gradients(("core",), (core,), (grad_core,))


def _product_key_topk(
    bench: _Bench,
    *,
    mode: Mode,
    heads: int,
    queries: int,
    rank: int,
    cores: int,
    tokens: int = 17,
    num_keys: int = 45,
    key_dim: int = 24,
    topk: int = 24,
) -> Iterator[Result]:
    query = bench.normal(tokens, 2, heads, queries, key_dim)
    keys = bench.normal(heads, 2, rank, num_keys, key_dim)
    core = bench.uniform(cores, heads, rank, rank) if mode == "tucker" else None
    scores, indices = ops.product_key_topk(query, keys, core, topk=topk, mode=mode)
    upstream = bench.upstream(scores)
    scores.backward(upstream)

    inputs = array(query), array(keys), None if core is None else array(core)
    selection = ref.product_key_topk(*inputs, topk=topk, mode=mode)
    unit = float(torch.finfo(bench.wide).eps)
    kept = ref.compare_kept_sets(
        selection,
        indices.cpu().numpy(),
        axis_band=ref.axis_band(*inputs[:2], selection.axis_filter, unit=unit),
        grid_band=ref.grid_band(*inputs, unit=unit),
    )
    yield "kept slots, tokens that differ", float(len(kept.violations)), 0.0
    # Scores and gradients are judged at the operator's own selection.
    chosen = indices.cpu().numpy()
    yield bench.score("scores", scores, ref.product_key_scores_at(*inputs, chosen, mode))
    expected = ref.product_key_topk_bwd(array(upstream), *inputs, chosen, mode=mode)
    leaves = [query, keys] if core is None else [query, keys, core]
    names = ("query", "keys", "core")[: len(leaves)]
    yield from bench.gradients(names, leaves, expected[: len(leaves)])


def _key_balance_loss(bench: _Bench) -> Iterator[Result]:
    tokens, heads, rank, num_keys, key_dim = 17, 2, 2, 45, 12
    query = bench.normal(tokens, 2, heads, rank, key_dim)
    keys = bench.normal(heads, 2, rank, num_keys, key_dim)
    kept = bench.integers(num_keys, tokens, heads, 2, 8)
    u, t, _ = ops.tucker_filter(bench.uniform(2, heads, rank, rank))
    loss = ops.key_balance_loss(query, keys, kept, u=u, t=t).sum()
    loss.backward()

    inputs = array(query), array(keys), kept.cpu().numpy(), array(u), array(t)
    expected = np.array(ref.key_balance_loss(*inputs, beta=1.0))
    yield bench.score("loss", loss, expected)
    grads = ref.key_balance_loss_bwd(*inputs, beta=1.0)
    yield from bench.gradients(("query", "keys"), (query, keys), grads)


def _value_ffn(
    bench: _Bench,
    *,
    activation: Activation = "identity",
    pre_values: bool = True,
    sum_groups: bool = True,
    main_grad: bool = False,
    deferred: bool = False,
    scale: tuple[float, float] | None = None,
    dims: tuple[int, int] = (20, 36),
) -> Iterator[Result]:
    tokens, selected, cores = 19, 24, 2
    pre_dim, value_dim = dims
    # Four virtual copies of 100 rows of 150, wrapping around the end of the table.
    addressing = SlotAddressing(150, 100, offset=75, expand=4, shuffle="feistel", seed=7)
    indices = bench.integers(addressing.num_virtual, tokens, selected)
    scores = bench.normal(tokens, selected, cores, wide=True)
    leaves = [scores, bench.normal(addressing.num_slots, value_dim)]
    if pre_values:
        leaves += [bench.normal(addressing.num_slots, pre_dim), bench.normal(tokens, pre_dim)]
    for table in leaves[1:3] if main_grad else []:
        table.main_grad = torch.zeros_like(table, dtype=bench.wide)  # type: ignore[attr-defined]
    table = leaves[1]
    factors = GradientFactors(
        addressing.num_slots,
        value_dim,
        pre_dim if pre_values else 0,
        dtype=table.dtype,
        device=table.device,
    )
    out = ops.value_ffn(
        indices,
        *leaves,
        activation=activation,
        addressing=addressing,
        sum_groups=sum_groups,
        table_scale=None
        if scale is None
        else torch.tensor(scale, dtype=torch.float64).to(indices.device),
        factors=factors if deferred else None,
    )
    upstream = bench.upstream(out)
    out.backward(upstream)
    for table, grad in zip(leaves[1:3], factors.to_dense() if deferred else (), strict=False):
        table.grad = None if grad is None else grad.to(table.dtype)
    for table in leaves[1:3] if main_grad else []:
        table.grad = table.main_grad.to(table.dtype)  # type: ignore[attr-defined]

    inputs = [indices.cpu().numpy(), *(array(leaf) for leaf in leaves)]
    expected = ref.value_ffn(
        *inputs,
        activation=activation,
        addressing=addressing,
        sum_groups=sum_groups,
        table_scale=scale,
    )
    yield bench.forward("out", out, expected)
    grads = ref.value_ffn_bwd(
        array(upstream),
        *inputs,
        activation=activation,
        addressing=addressing,
        sum_groups=sum_groups,
        table_scale=scale,
    )
    names = ("scores", "values", "pre_values", "pre_input")[: len(leaves)]
    right = (grads.scores, grads.values, grads.pre_values, grads.pre_input)[: len(leaves)]
    yield from bench.gradients(names, leaves, right)


def _optimizer(bench: _Bench, kind: str) -> Iterator[Result]:
    """A step, and the norm before it, of factors: more rows than a GPU has warps for, and one that
    many entries name."""
    tokens, selected, cores, num_slots = 1100, 20, 2, 18_000
    table = MemoryTable(
        num_slots, 48, 24, dtype=bench.dtype, device=bench.device, grad_mode="deferred"
    )
    with torch.no_grad():
        for param in table.parameters():
            param.copy_(bench.normal(*param.shape))
    indices = bench.integers(num_slots, tokens, selected)
    indices[:100, :5] = 7
    scores = bench.normal(tokens, selected, cores, wide=True)
    pre_input = bench.normal(tokens, 24)
    out = ops.value_ffn(
        indices, scores, table.values, table.pre_values, pre_input, factors=table.factors
    )
    out.backward(bench.upstream(out))
    assert table.factors is not None
    gradients = [array(grad) for grad in table.factors.to_dense() if grad is not None]
    before = [array(param).copy() for param in table.parameters()]
    norm = clip_grad_norm_(table, float("inf"))
    expected_norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    yield bench.score("norm", norm, np.array(expected_norm))

    lr, eps = 0.1, 0.05  # so large that no small gradient decides the direction of a step
    params = table.parameters()
    optimizer: MemoryOptimizer
    if kind == "adam":
        optimizer = MemoryAdam(params, lr, eps=eps, stochastic_rounding=False)
    elif kind == "adagrad":
        optimizer = MemoryAdagrad(params, lr, eps=eps, stochastic_rounding=False)
    else:
        optimizer = MemorySGD(params, lr, stochastic_rounding=False)
    optimizer.step()
    rows = np.unique(indices.cpu().numpy())
    for (name, param), old, gradient in zip(
        table.named_parameters(), before, gradients, strict=True
    ):
        update = old, gradient[rows]
        if kind == "adam":
            # eps comes before the correction of the second moment.
            corrected_eps = eps / np.sqrt(1.0 - 0.999)
            new, _ = ref.adam_update(
                *update, ref.adam_init(old), lr=lr, eps=corrected_eps, rows=rows
            )
        elif kind == "adagrad":
            new, _ = ref.adagrad_update(*update, ref.adagrad_init(old), lr=lr, eps=eps, rows=rows)
        else:
            new, _ = ref.sgd_update(*update, ref.sgd_init(old), lr=lr, rows=rows)
        yield bench.forward(name, param, new)


_OPERATORS: dict[str, Callable[[_Bench], Iterator[Result]]] = {
    "rms_norm": _rms_norm,
    "tucker_query": _tucker_query,
    "tucker_filter": _tucker_filter,
    "product_key_topk, query per rank": partial(
        _product_key_topk, mode="tucker", heads=1, queries=2, rank=2, cores=2
    ),
    "product_key_topk, shared query": partial(
        _product_key_topk, mode="tucker", heads=2, queries=1, rank=3, cores=1
    ),
    "product_key_topk, additive": partial(
        _product_key_topk, mode="additive", heads=2, queries=1, rank=1, cores=1
    ),
    # Few tokens, and some, with longer keys: larger tiles.
    "product_key_topk, some tokens": partial(
        _product_key_topk,
        mode="tucker",
        heads=1,
        queries=2,
        rank=2,
        cores=2,
        tokens=150,
        num_keys=301,
        key_dim=328,
        topk=40,
    ),
    "product_key_topk, few tokens": partial(
        _product_key_topk,
        mode="tucker",
        heads=2,
        queries=2,
        rank=2,
        cores=2,
        tokens=37,
        num_keys=301,
        key_dim=72,
        topk=40,
    ),
    # Many tokens: kernels differ by heads (more blocks than run at once), ranks and kept keys.
    "product_key_topk, many tokens": partial(
        _product_key_topk,
        mode="tucker",
        heads=17,
        queries=2,
        rank=2,
        cores=2,
        tokens=193,
        num_keys=150,
        key_dim=72,
    ),
    "product_key_topk, many tokens, some kept": partial(
        _product_key_topk,
        mode="tucker",
        heads=17,
        queries=2,
        rank=2,
        cores=1,
        tokens=193,
        num_keys=90,
        key_dim=24,
        topk=36,
    ),
    "product_key_topk, many tokens, many kept": partial(
        _product_key_topk,
        mode="tucker",
        heads=1,
        queries=1,
        rank=2,
        cores=2,
        tokens=1060,
        num_keys=301,
        key_dim=72,
        topk=96,
    ),
    "product_key_topk, many tokens, some longer keys": partial(
        _product_key_topk,
        mode="tucker",
        heads=17,
        queries=2,
        rank=2,
        cores=1,
        tokens=193,
        num_keys=70,
        key_dim=200,
    ),
    "product_key_topk, many tokens, long keys": partial(
        _product_key_topk,
        mode="tucker",
        heads=1,
        queries=1,
        rank=2,
        cores=2,
        tokens=1060,
        num_keys=301,
        key_dim=264,
        topk=40,
    ),
    "product_key_topk, many tokens, many ranks": partial(
        _product_key_topk,
        mode="tucker",
        heads=1,
        queries=4,
        rank=4,
        cores=1,
        tokens=1060,
        num_keys=150,
        key_dim=24,
    ),
    "product_key_topk, many tokens, additive": partial(
        _product_key_topk,
        mode="additive",
        heads=1,
        queries=1,
        rank=1,
        cores=1,
        tokens=1060,
        num_keys=301,
        key_dim=72,
        topk=40,
    ),
    # More keys than the kernels of sm_90 take: those of sm_80, on every GPU.
    "product_key_topk, many keys": partial(
        _product_key_topk,
        mode="tucker",
        heads=1,
        queries=1,
        rank=2,
        cores=1,
        tokens=70,
        num_keys=8300,
        key_dim=24,
    ),
    "key_balance_loss": _key_balance_loss,
    "value_ffn": _value_ffn,
    "value_ffn, plain values": partial(_value_ffn, pre_values=False),
    "value_ffn, gelu, groups apart": partial(_value_ffn, activation="gelu", sum_groups=False),
    "value_ffn, relu": partial(_value_ffn, activation="relu"),
    "value_ffn, silu": partial(_value_ffn, activation="silu"),
    "value_ffn, main_grad": partial(_value_ffn, main_grad=True),
    "value_ffn, deferred": partial(_value_ffn, deferred=True),
    "value_ffn, deferred, groups apart": partial(_value_ffn, deferred=True, sum_groups=False),
    "value_ffn, deferred, scaled": partial(_value_ffn, deferred=True, scale=(0.3, 0.7)),
    "value_ffn, whole vectors": partial(_value_ffn, dims=(24, 48)),
    "value_ffn, whole vectors, main_grad": partial(_value_ffn, dims=(24, 48), main_grad=True),
    "value_ffn, whole vectors, deferred": partial(_value_ffn, dims=(520, 48), deferred=True),
    "MemoryAdam": partial(_optimizer, kind="adam"),
    "MemoryAdagrad": partial(_optimizer, kind="adagrad"),
    "MemorySGD": partial(_optimizer, kind="sgd"),
}
