"""The key balance loss against the NumPy reference and the dense formula, and how much memory it
takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers import Data, array, check_gradient, check_only_some_train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ultramem_cuda import ops
from ultramem_cuda import python_ref as ref
from ultramem_cuda.ops import _key_balance


class Case(NamedTuple):
    tokens: int
    num_keys: int
    key_dim: int
    axis_topk: int
    rank: int = 2
    heads: int = 1
    shared_query: bool = False
    additive: bool = False


CASES = {
    "one_token": Case(1, 9, 5, 3),
    "two_heads": Case(33, 37, 12, 8, heads=2),
    "shared_query": Case(40, 37, 12, 8, rank=3, heads=2, shared_query=True),
    "rank_4": Case(20, 65, 16, 16, rank=4),
    "rank_1": Case(20, 65, 7, 16, rank=1),
    "nearly_all_kept": Case(20, 8, 16, 7),
    "additive": Case(29, 31, 8, 6, rank=1, heads=3, additive=True),
}
# Bytes for the scores of a part of the tokens: all at once, some with a shorter last part, one.
PART_BYTES = {"whole": 16_000_000, "parts": 30_000, "one_by_one": 1}


def make_inputs(
    case: Case, device: str, dtype: torch.dtype, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """query, keys, the keys that were really kept, u, t."""
    data = Data(seed, device)
    queries = 1 if case.shared_query else case.rank
    query = data.normal(case.tokens, 2, case.heads, queries, case.key_dim, dtype=dtype, scale=0.7)
    keys = data.normal(case.heads, 2, case.rank, case.num_keys, case.key_dim, dtype=dtype)
    core, u, t, mode = None, None, None, "additive"
    if not case.additive:
        core, mode = data.cores(2, case.heads, case.rank), "tucker"
        u, t, _ = ops.tucker_filter(core)
    _, _, kept = ops.product_key_topk(
        query,
        keys,
        core,
        topk=case.axis_topk,
        axis_topk=case.axis_topk,
        u=u,
        t=t,
        mode=mode,
        return_axis_indices=True,
    )
    return query, keys, kept, u, t


def dense_loss(
    query: Tensor, keys: Tensor, kept: Tensor, u: Tensor, t: Tensor, normalize: str
) -> Tensor:
    """The formula as it stands, with all scores of all keys."""
    tokens, num_keys = query.shape[0], keys.shape[3]
    losses = []
    for side, direction in enumerate((u, t)):
        queries = query[:, side].expand(-1, -1, keys.shape[2], -1)
        scores = torch.einsum("hr,thrk,hrnk->thn", direction, queries, keys[:, side])
        mean = scores.softmax(-1).mean((0, 1))
        counts = kept[:, :, side].flatten().long().bincount(minlength=num_keys)
        total = tokens if normalize == "paper" else kept[:, :, side].numel()
        losses.append(num_keys * (counts.to(mean.dtype) / total * mean).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("normalize", ["paper", "release"])
@pytest.mark.parametrize("part_bytes", PART_BYTES.values(), ids=PART_BYTES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(
    device_dtype: tuple[str, torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    part_bytes: int,
    normalize: str,
) -> None:
    monkeypatch.setattr(_key_balance, "_PART_BYTES", part_bytes)
    device, dtype = device_dtype
    query, keys, kept, u, t = make_inputs(CASES[name], device, dtype)
    leaves = [x.detach().requires_grad_() for x in (query, keys)]
    loss = ops.key_balance_loss(*leaves, kept, u=u, t=t, normalize=normalize)
    assert loss.shape == (2,)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    filters = [torch.ones(query.shape[2], 1) if x is None else x for x in (u, t)]
    arrays = [array(x) for x in (query, keys, kept, *filters)]
    expected_loss = ref.key_balance_loss(*arrays, beta=1.0, normalize=normalize)
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    assert loss.sum().item() == pytest.approx(expected_loss, rel=bound)

    grads = torch.autograd.grad(loss.sum(), leaves)
    expected = ref.key_balance_loss_bwd(*arrays, beta=1.0, normalize=normalize)
    for which, grad, wanted in zip(("query", "keys"), grads, expected, strict=True):
        check_gradient(f"grad_{which}", grad, wanted)


@pytest.mark.parametrize("normalize", ["paper", "release"])
def test_equals_the_dense_formula_side_by_side(normalize: str) -> None:
    query, keys, kept, u, t = make_inputs(CASES["two_heads"], "cpu", torch.float64)
    assert u is not None
    assert t is not None
    leaves = [x.detach().requires_grad_() for x in (query, keys)]
    loss = ops.key_balance_loss(*leaves, kept, u=u, t=t, normalize=normalize)
    expected = dense_loss(*leaves, kept, u, t, normalize)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0.0)
    upstream = torch.tensor([0.3, -2.0], dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        rtol=1e-11,
        atol=1e-15,
    )


def test_even_use_gives_the_least_loss(device: str) -> None:
    query, keys = torch.zeros(12, 2, 1, 1, 4, device=device), torch.zeros(1, 2, 1, 6, 4)
    keys = keys.to(device)
    kept = torch.arange(48, device=device).view(12, 1, 2, 2) % 6
    assert ops.key_balance_loss(query, keys, kept).tolist() == pytest.approx([2.0, 2.0], rel=1e-5)
    even = ops.key_balance_loss(query, keys, kept, normalize="release")
    assert even.tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    query[:, 0] = keys[0, 0, 0, 0] = 1.0
    skewed = ops.key_balance_loss(query, keys, kept * 0, normalize="release")
    assert skewed[0].item() > 2.0
    assert skewed[1].item() == pytest.approx(1.0, rel=1e-5)


def test_no_tokens(device: str) -> None:
    query = torch.zeros(0, 2, 2, 3, 4, device=device, requires_grad=True)
    keys = torch.ones(2, 2, 3, 5, 4, device=device, requires_grad=True)
    kept = torch.zeros(0, 2, 2, 3, dtype=torch.int32, device=device)
    filter_ = torch.ones(2, 3, device=device)
    loss = ops.key_balance_loss(query, keys, kept, u=filter_, t=filter_)
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert query.grad is not None
    assert keys.grad is not None
    assert not keys.grad.any()


@pytest.mark.parametrize("trained", [("query",), ("keys",)], ids="-".join)
def test_only_some_inputs_train(device: str, trained: tuple[str, ...]) -> None:
    query, keys, kept, u, t = make_inputs(CASES["two_heads"], device, torch.float32)
    check_only_some_train(
        lambda query, keys: ops.key_balance_loss(query, keys, kept, u=u, t=t),
        {"query": query.requires_grad_(), "keys": keys.requires_grad_()},
        trained,
    )


@pytest.mark.gpu
def test_an_index_out_of_range_counts_as_none() -> None:
    query, keys, kept, u, t = make_inputs(CASES["two_heads"], "cuda", torch.float32)
    expected = ops.key_balance_loss(query, keys, kept[..., :-2].contiguous(), u=u, t=t)
    spoiled = kept.clone()
    spoiled[..., -2], spoiled[..., -1] = -1, 37
    torch.testing.assert_close(ops.key_balance_loss(query, keys, spoiled, u=u, t=t), expected)


# ---- memory --------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The most bytes of a tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


def test_scores_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not show a mode what an operator does inside: its two functions are called."""
    monkeypatch.setattr(_key_balance, "_PART_BYTES", 100_000)
    case = Case(3000, 200, 8, 4)
    query, keys, kept, u, t = make_inputs(case, "cpu", torch.float32)
    with LargestTensor() as forward:
        loss, frequencies = _key_balance._forward(query, keys, kept, u, t, "paper")
    with LargestTensor() as backward:
        _key_balance._backward(torch.ones_like(loss), query, keys, frequencies, u, t)
    scores_bytes = case.tokens * case.num_keys * 4
    # Those of the gradients of the inputs; the forward looks at the kept keys' range as a whole.
    assert forward.nbytes <= max(100_000, kept.nbytes)
    assert backward.nbytes == query.nbytes
    assert max(forward.nbytes, backward.nbytes) < scores_bytes / 4


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8192, 65536])
def test_peak_memory(tokens: int) -> None:
    """At shape S but for the number of tokens, beyond inputs and gradients."""
    case = Case(tokens, 1138, 192, 32)
    query, keys, kept, u, t = make_inputs(case, "cuda", torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in (query, keys)]
    for _ in range(2):  # cuBLAS allocates its workspace once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = ops.key_balance_loss(*leaves, kept, u=u, t=t)
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        grads = torch.autograd.grad(loss.sum(), leaves)
        backward = torch.cuda.max_memory_allocated() - before
        backward -= sum(grad.nbytes for grad in grads)
        del loss, grads
    # Scores would take 37 MB a side at the smaller size. Besides a part there are float32 keys of a
    # side and their gradient, 1.7 MB each, for a moment twice, and what cuBLAS takes for itself.
    assert forward <= 16e6 + 14e6
    assert backward <= 16e6 + 14e6
