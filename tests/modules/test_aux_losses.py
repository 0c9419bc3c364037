"""Tucker penalty and key balance loss against the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from module_cases import PKM, layer_and_table, to_numpy, tokens

import ultramem_cuda as um
from ultramem_cuda import losses
from ultramem_cuda import python_ref as ref


def reference_axes(
    layer: um.UltraMemLayer, query: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """axis_indices [T, H, 2, m], u, t as the reference selects."""
    config = layer.config
    selection = ref.product_key_topk(
        query,
        keys,
        None if layer.cores is None else to_numpy(layer.cores),
        topk=config.topk,
        axis_topk=config.kept_per_axis,
        mode=config.mode,
    )
    if layer.cores is None:
        u = t = np.ones((config.num_heads, 1))
    else:
        u, t, _ = ref.tucker_filter(to_numpy(layer.cores))
    return selection.axis_indices, u, t


@pytest.mark.parametrize("normalize", ["paper", "release"])
@pytest.mark.parametrize(
    "overrides", [{}, {"num_heads": 2, "query_per_rank": False}, PKM], ids=["one", "two", "pkm"]
)
def test_layer_losses_equal_the_reference(overrides: dict[str, Any], normalize: str) -> None:
    weights: dict[str, Any] = {"key_balance": 0.7, "key_balance_normalize": normalize}
    if "mode" not in overrides:
        weights |= {"tucker_penalty": 0.3, "tucker_margin": 0.1}
    layer, table = layer_and_table(torch.float64, **overrides, **weights)
    x = tokens(11, 24, dtype=torch.float64).requires_grad_()
    layer(x, table)
    config = layer.config

    query = ref.tucker_query(
        to_numpy(x), to_numpy(layer.query_proj.weight), to_numpy(layer.query_norm), config.num_heads
    )
    keys = ref.rms_norm(to_numpy(layer.keys), to_numpy(layer.key_norm))
    axis_indices, u, t = reference_axes(layer, query, keys)
    arguments = (query, keys, axis_indices, u, t)
    expected = ref.key_balance_loss(*arguments, beta=0.7, normalize=normalize)
    balance = layer.last_losses["key_balance"]
    assert balance.item() == pytest.approx(expected, rel=1e-12)

    balance.backward()
    grad_query, grad_keys = ref.key_balance_loss_bwd(*arguments, beta=0.7, normalize=normalize)
    grad_x, grad_weight, _ = ref.tucker_query_bwd(
        grad_query,
        to_numpy(x),
        to_numpy(layer.query_proj.weight),
        to_numpy(layer.query_norm),
        config.num_heads,
    )
    raw_keys, _ = ref.rms_norm_bwd(grad_keys, to_numpy(layer.keys), to_numpy(layer.key_norm))
    for actual, wanted in (
        (x.grad, grad_x),
        (layer.query_proj.weight.grad, grad_weight),
        (layer.keys.grad, raw_keys),
    ):
        assert actual is not None
        assert np.abs(wanted).max() > 1e-6
        np.testing.assert_allclose(to_numpy(actual), wanted, rtol=1e-9, atol=1e-12)

    if layer.cores is not None:
        assert layer.cores.grad is None
        penalty = layer.last_losses["tucker_penalty"]
        core = to_numpy(layer.cores)
        assert penalty.item() == pytest.approx(ref.tucker_penalty(core, alpha=0.3, tau=0.1))
        assert penalty.item() > 0
        penalty.backward()
        wanted = ref.tucker_penalty_bwd(core, alpha=0.3, tau=0.1)
        np.testing.assert_allclose(to_numpy(layer.cores.grad), wanted, rtol=1e-9, atol=1e-12)


def test_penalty_of_rank_one_and_margin() -> None:
    assert losses.tucker_penalty(torch.tensor([[3.0]])).item() == 0.0
    assert losses.tucker_penalty(torch.tensor([[3.0, 0.1]])).item() == 0.0
    sigma = torch.tensor([[3.0, 1.15], [2.0, 0.65]])
    assert losses.tucker_penalty(sigma).item() == pytest.approx((1.0 + 0.25) / 2)


def test_bad_singular_values() -> None:
    with pytest.raises(ValueError, match=r"sigma: must have shape \[H, R\]"):
        losses.tucker_penalty(torch.ones(2))


def test_off_by_default_and_in_eval() -> None:
    layer, table = layer_and_table()
    layer(tokens(4, 24), table)
    assert layer.last_losses == {}
    layer, table = layer_and_table(tucker_penalty=0.1, key_balance=0.1)
    layer(tokens(4, 24), table)
    assert set(layer.last_losses) == {"tucker_penalty", "key_balance"}
    layer.eval()
    layer(tokens(4, 24), table)
    assert layer.last_losses == {}


def test_collecting_over_layers() -> None:
    pairs = [layer_and_table(tucker_penalty=0.1, key_balance=0.1, layer_index=i) for i in (0, 2)]
    model = torch.nn.ModuleList(layer for layer, _ in pairs)
    for layer, table in pairs:
        layer(tokens(4, 24), table)
    totals = losses.collect_aux_losses(model)
    for name in ("tucker_penalty", "key_balance"):
        parts = [layer.last_losses[name] for layer, _ in pairs]
        assert totals[name].item() == pytest.approx(sum(p.item() for p in parts))
    assert losses.collect_aux_losses(torch.nn.Linear(2, 2)) == {}


def test_no_tokens_and_autocast() -> None:
    layer, table = layer_and_table(tucker_penalty=0.1, key_balance=0.1)
    layer(tokens(0, 24), table)
    assert layer.last_losses["key_balance"].item() == 0.0
    layer.last_losses["key_balance"].backward()
    layer(tokens(64, 24), table)
    exact = layer.last_losses["key_balance"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(tokens(64, 24), table)
    assert layer.last_losses["key_balance"].dtype == torch.float32
    assert layer.last_losses["key_balance"].item() == pytest.approx(exact, rel=0.02)


def test_what_the_losses_share_with_the_retrieval_changes_nothing() -> None:
    """With losses on, keys are normalised and the filter is made outside of the operator."""
    plain, table = layer_and_table(num_heads=2)
    with_losses, _ = layer_and_table(num_heads=2, tucker_penalty=0.1, key_balance=0.1)
    x = tokens(9, 24)
    assert torch.equal(with_losses(x, table), plain(x, table))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(with_losses(x, table), plain(x, table))


@pytest.mark.gpu
def test_key_balance_holds_no_scores_of_all_keys() -> None:
    """Peak memory of a training step with the loss, against one without."""
    num_tokens, num_keys = 16384, 1024
    sizes = {"num_keys": num_keys, "num_slots": num_keys**2, "key_dim": 32, "topk": 8}
    peaks = []
    for key_balance in (0.0, 0.1):
        layer, table = layer_and_table(**sizes, key_balance=key_balance)
        layer, table = layer.cuda(), table.cuda()
        x = tokens(num_tokens, 24).cuda()
        for _ in range(2):  # cuBLAS allocates its workspace once
            layer.zero_grad()
            table.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = layer(x, table).square().mean() + sum(layer.last_losses.values())
            loss.backward()
            layer.last_losses = {}
            del loss
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # Scores of all keys would be 67 MB a side.
    assert peaks[1] - peaks[0] < 40e6
