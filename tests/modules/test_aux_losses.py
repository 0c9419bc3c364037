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


def test_even_use_gives_the_least_balance_loss() -> None:
    scores = torch.zeros(12, 1, 6, dtype=torch.float64)
    indices = torch.arange(24).view(12, 1, 2) % 6
    assert losses.key_balance_loss(scores, indices).item() == pytest.approx(2.0)
    even = losses.key_balance_loss(scores, indices, normalize="release")
    assert even.item() == pytest.approx(1.0)
    scores[:, :, 0] = 3.0
    skewed = losses.key_balance_loss(scores, indices * 0, normalize="release")
    assert skewed.item() > 2.0


def test_penalty_of_rank_one_and_margin() -> None:
    assert losses.tucker_penalty(torch.tensor([[3.0]])).item() == 0.0
    assert losses.tucker_penalty(torch.tensor([[3.0, 0.1]])).item() == 0.0
    sigma = torch.tensor([[3.0, 1.15], [2.0, 0.65]])
    assert losses.tucker_penalty(sigma).item() == pytest.approx((1.0 + 0.25) / 2)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"sigma: must have shape \[H, R\]"):
        losses.tucker_penalty(torch.ones(2))
    scores, indices = torch.zeros(3, 1, 4), torch.zeros(3, 1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="normalize: must be 'paper' or 'release', got 'x'"):
        losses.key_balance_loss(scores, indices, normalize="x")
    with pytest.raises(ValueError, match=r"axis_indices: must have shape \[3, 1, m\]"):
        losses.key_balance_loss(scores, indices[:2])


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


def test_key_balance_refuses_what_are_not_indices() -> None:
    with pytest.raises(TypeError, match="axis_indices: must be int32 or int64"):
        losses.key_balance_loss(torch.zeros(2, 1, 5), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="axis_scores: must have shape"):
        losses.key_balance_loss(torch.zeros(2, 5), torch.zeros(2, 1, 3, dtype=torch.int64))


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


def test_no_tokens_meta_and_autocast() -> None:
    layer, table = layer_and_table(tucker_penalty=0.1, key_balance=0.1)
    layer(tokens(0, 24), table)
    assert layer.last_losses["key_balance"].item() == 0.0
    layer.last_losses["key_balance"].backward()
    query, keys = tokens(3, 2, 1, 2, 6).to("meta"), tokens(1, 2, 2, 12, 6).to("meta")
    directions = torch.ones(2, 1, 2, device="meta")
    assert losses.axis_filter_scores(query, keys, directions).shape == (2, 3, 1, 12)
    layer(tokens(64, 24), table)
    exact = layer.last_losses["key_balance"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(tokens(64, 24), table)
    assert layer.last_losses["key_balance"].dtype == torch.float32
    assert layer.last_losses["key_balance"].item() == pytest.approx(exact, rel=0.02)
