from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gradient_checks import assert_close, assert_matches_finite_differences, leaf

from ultramem_cuda import python_ref as ref

NUM_TOKENS, D_MODEL, KEY_DIM, NUM_KEYS, PRE_DIM, VALUE_DIM = 5, 7, 3, 6, 4, 8
EPS = 0.2

# name: heads, ranks, queries a side, cores (0: additive), pre-values, config
VARIANTS = {
    "V2": (1, 2, 2, 2, True, {}),
    "V2, gelu, shared query, four heads' worth": (2, 3, 1, 4, True, {"activation": "gelu"}),
    "V2, shuffled window": (
        1,
        2,
        2,
        2,
        True,
        {"addressing": ref.SlotAddressing(40, 36, 17, 1, "feistel", 3)},
    ),
    "V2, value expansion, groups summed": (
        1,
        2,
        2,
        1,
        True,
        {"addressing": ref.SlotAddressing(12, 9, 8, 4, "feistel", 3)},
    ),
    "V1, value expansion, a projection a group": (
        2,
        2,
        1,
        2,
        False,
        {"addressing": ref.SlotAddressing(9, 9, 0, 4, "feistel", 3), "sum_groups": False},
    ),
    "PKM": (2, 1, 1, 0, False, {"mode": "additive"}),
    "PEER": (2, 1, 1, 0, True, {"mode": "additive", "activation": "silu"}),
}


def build(name: str) -> tuple[np.ndarray, ref.LayerParams, ref.LayerConfig]:
    num_heads, rank, num_queries, num_cores, with_pre, fields = VARIANTS[name]
    config = ref.LayerConfig(topk=5, axis_topk=5, num_heads=num_heads, eps=EPS, **fields)
    num_slots = config.addressing.num_slots if config.addressing else NUM_KEYS**2
    expand = config.addressing.expand if config.addressing and not config.sum_groups else 1
    normal = np.random.default_rng(0).standard_normal
    params = ref.LayerParams(
        query_proj=normal((2 * num_heads * num_queries * KEY_DIM, D_MODEL)),
        query_norm=normal(KEY_DIM),
        keys=normal((num_heads, 2, rank, NUM_KEYS, KEY_DIM)),
        key_norm=normal(KEY_DIM),
        cores=normal((num_cores, num_heads, rank, rank)) if num_cores else None,
        value_proj=normal((D_MODEL, expand * VALUE_DIM)),
        values=normal((num_slots, VALUE_DIM)),
        pre_proj=normal((PRE_DIM, D_MODEL)) if with_pre else None,
        pre_values=normal((num_slots, PRE_DIM)) if with_pre else None,
    )
    return normal((NUM_TOKENS, D_MODEL)), params, config


def torch_layer(
    x: torch.Tensor, p: dict[str, torch.Tensor], config: ref.LayerConfig, indices: np.ndarray
) -> torch.Tensor:
    """One token, head and slot at a time, straight from the equations."""
    num_heads, rank = p["keys"].shape[0], p["keys"].shape[2]
    num_queries = p["query_proj"].shape[0] // (2 * num_heads * KEY_DIM)
    norm = torch.nn.functional.rms_norm
    keys = norm(p["keys"], (KEY_DIM,), p["key_norm"], EPS)
    act = {
        "identity": lambda a: a,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
    }
    rows = []
    for token in range(x.shape[0]):
        query = (p["query_proj"] @ x[token]).view(2, num_heads, num_queries, KEY_DIM)
        query = norm(query, (KEY_DIM,), p["query_norm"], EPS).expand(2, num_heads, rank, KEY_DIM)
        y = torch.zeros(D_MODEL, dtype=torch.float64)
        for head in range(num_heads):
            for index in indices[token, head].tolist():
                i, j = divmod(index, NUM_KEYS)
                row = (query[0, head] * keys[head, 0, :, i]).sum(-1)  # [R]
                col = (query[1, head] * keys[head, 1, :, j]).sum(-1)
                if "cores" in p:
                    scores = torch.stack([row @ core @ col for core in p["cores"][:, head]])
                else:
                    scores = row + col
                slot, group = index, 0
                if config.addressing:
                    slot, group = (int(a) for a in ref.slots(index, **vars(config.addressing)))
                weights = scores
                if "pre_values" in p:
                    a = p["pre_values"][slot] @ (p["pre_proj"] @ x[token])
                    weights = scores * act[config.activation](a)
                value = weights.repeat_interleave(VALUE_DIM // len(scores)) * p["values"][slot]
                group = 0 if config.sum_groups else group
                projection = p["value_proj"][:, group * VALUE_DIM : (group + 1) * VALUE_DIM]
                y = y + projection @ value
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_forward_and_backward(name: str) -> None:
    x, params, config = build(name)
    rng = np.random.default_rng(1)
    grad_y = rng.standard_normal(x.shape)
    output = ref.memory_layer(x, params, config)
    grad_x, grads = ref.memory_layer_bwd(grad_y, x, params, config, output)

    names = [key for key, value in vars(params).items() if value is not None]
    assert [key for key, value in vars(grads).items() if value is not None] == names
    tensors = {key: leaf(getattr(params, key)) for key in names}
    x_tensor = leaf(x)
    expected = torch_layer(x_tensor, tensors, config, output.indices)
    expected.backward(torch.tensor(grad_y))
    assert_close(output.y, expected)
    assert_close(grad_x, x_tensor.grad)
    for key in names:
        assert_close(getattr(grads, key), tensors[key].grad)

    def function(x: np.ndarray, *arguments: np.ndarray) -> float:
        changed = replace(params, **dict(zip(names, arguments, strict=True)))
        return (ref.memory_layer(x, changed, config, output.indices).y * grad_y).sum()

    assert_matches_finite_differences(
        function,
        [x, *(getattr(params, key) for key in names)],
        [grad_x, *(getattr(grads, key) for key in names)],
        rng,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_given_its_own_indices_the_layer_repeats_itself(name: str) -> None:
    x, params, config = build(name)
    output = ref.memory_layer(x, params, config)
    assert output.selection is not None
    again = ref.memory_layer(x, params, config, output.indices)
    assert again.selection is None
    np.testing.assert_allclose(again.y, output.y, rtol=1e-12, atol=1e-13)


def test_layer_without_tokens() -> None:
    x, params, config = build("V2")
    output = ref.memory_layer(x[:0], params, config)
    assert output.y.shape == (0, D_MODEL)
    grad_x, grads = ref.memory_layer_bwd(output.y, x[:0], params, config, output)
    assert grad_x.shape == (0, D_MODEL)
    for key, value in vars(grads).items():
        assert value.shape == getattr(params, key).shape
        assert not value.any()
