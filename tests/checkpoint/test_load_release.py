"""load_release: weights of the published code, and the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import published
import pytest
import torch
from torch import Tensor

import ultramem_cuda as um


def modules(
    released: um.checkpoint.ReleasedMemory,
) -> tuple[um.MemoryTable, list[um.UltraMemLayer]]:
    table = um.MemoryTable.from_config(released.config)
    table.load_state_dict(released.table)
    layers = [um.UltraMemLayer(released.config, i) for i in range(released.config.num_layers)]
    for layer, state in zip(layers, released.layers, strict=True):
        layer.load_state_dict(state)
    return table, layers


def check_same_outputs(state: dict[str, Tensor], options: dict[str, Any]) -> None:
    table, layers = modules(um.checkpoint.load_release(state, options))
    x = published.tokens(options)
    for index, layer in enumerate(layers):
        expected = published.forward(state, options, index, x)
        with torch.no_grad():
            out = layer(x, table)
        assert (out - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("key_expand", [1, 2])
def test_same_outputs(key_expand: int, heads: int) -> None:
    options = published.options(mem_key_expand_time=key_expand, mem_head=heads)
    check_same_outputs(published.state_dict(options), options)


@pytest.mark.parametrize(
    "overrides",
    [
        {"mem_use_glu_act": True},
        {"mem_pre_vdim": 0},
        {"mem_share_ratio": 1.0, "mem_head": 4},
        {"mem_key_expand_time": 2, "mem_value_expand_time": 4},
        {"layer_norm_eps": 1e-2},
    ],
)
def test_same_outputs_with_options(overrides: dict[str, Any]) -> None:
    options = published.options(**overrides)
    check_same_outputs(published.state_dict(options), options)


def test_the_sign_of_the_filter_matters() -> None:
    # Otherwise the tests above would not show that it is heeded.
    options = published.options()
    state = published.state_dict(options)
    flipped = dict(state)
    for name in ("tucker_core_u", "tucker_core_v"):
        flipped[f"transformer.mem_blocks.0.{name}"] = -state[f"transformer.mem_blocks.0.{name}"]
    x = published.tokens(options)
    ours = [um.checkpoint.load_release(s, options).layers[0]["keys"] for s in (state, flipped)]
    assert torch.equal(ours[0], -ours[1])
    outputs = [published.forward(s, options, 0, x) for s in (state, flipped)]
    assert (outputs[0] - outputs[1]).norm() > 0.1 * outputs[0].norm()


def test_the_shared_window_wraps_around() -> None:
    # Otherwise the offsets would be tested less than they look.
    options = published.options()
    config = um.checkpoint.load_release(published.state_dict(options), options).config
    window, offset = config.layer_window(2)
    assert offset == 2 * 12 * 12
    assert offset + window > config.num_slots


def test_config() -> None:
    options = published.options(mem_key_expand_time=2, mem_head=2)
    state = published.state_dict(options)
    minimal = {"mem_knn": 7, "layer_norm_type": "rms", "mem_key_expand_time": 2}
    full, short = (um.checkpoint.load_release(state, o).config for o in (options, minimal))
    assert full == short
    n = 2 * published.shared_keys(options)
    assert (full.num_keys, full.num_slots, full.window) == (n, 3 * 144, n * n // 4)
    assert (full.num_queries, full.num_cores, full.eps) == (1, 2, 1e-5)


def test_untrained_filter() -> None:
    options = published.options()
    state = published.state_dict(options)
    for name in ("tucker_core_u", "tucker_core_v"):
        state[f"transformer.mem_blocks.1.{name}"].zero_()
    layer = um.checkpoint.load_release(state, options).layers[1]
    keys = state["transformer.mem_blocks.1.keys"]
    assert torch.equal(layer["keys"], keys.permute(0, 1, 4, 2, 3))


@pytest.mark.parametrize("kind", ["pt", "directory", "safetensors"])
def test_files(kind: str, tmp_path: Path) -> None:
    options = published.options()
    state = published.state_dict(options)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        safetensors_torch = pytest.importorskip("safetensors.torch")
        safetensors_torch.save_file(state, path)
    else:
        torch.save(state, path)
    expected = um.checkpoint.load_release(state, options)
    found = um.checkpoint.load_release(tmp_path if kind == "directory" else path, options)
    assert found.config == expected.config
    assert torch.equal(found.table["values"], expected.table["values"])
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("prefix", ["", "module.transformer."])
def test_prefixes(prefix: str) -> None:
    options = published.options()
    state = {
        name.replace("transformer.", prefix): value
        for name, value in published.state_dict(options).items()
    }
    found = um.checkpoint.load_release(state, options)
    assert um.checkpoint.load_release(state, options, prefix=prefix).config == found.config
    with pytest.raises(ValueError, match=r"other\.full_memory_layer\.values_for_look_up is miss"):
        um.checkpoint.load_release(state, options, prefix="other.")


def test_bad_names_and_shapes() -> None:
    options = published.options()
    block = "transformer.mem_blocks.1."

    def check(message: str, **changes: Tensor | None) -> None:
        state = published.state_dict(options)
        for name, value in changes.items():
            full = name if name.startswith("transformer.") else block + name
            if value is None:
                del state[full]
            else:
                state[full] = value
        with pytest.raises(ValueError, match=message):
            um.checkpoint.load_release(state, options)

    # The keys of keyword dictionaries may be any strings.
    check(r"mem_blocks\.1\.tucker_core_u is missing", tucker_core_u=None)
    check(r"mem_blocks\.1\.keys_norm\.bias is not a name", **{"keys_norm.bias": torch.ones(6)})
    check(r"mem_blocks\.1\.keys must be \[1, 2, 14, 6, 2\]", keys=torch.ones(1, 2, 14, 5, 2))
    check(
        r"mem_blocks\.1\.query_proj\.weight must be \[24, 24\], got \[12, 24\]",
        **{"query_proj.weight": torch.ones(12, 24)},
    )
    check(r"shuffle_index: .*permutation", shuffle_index=torch.zeros(196, dtype=torch.int64))
    check(
        r"tucker_core_u and tucker_core_v of head 0", tucker_core_v=torch.tensor([[[[1.0, -1.0]]]])
    )
    values = "transformer.full_memory_layer.values_for_look_up"
    check(r"one name must end in full_memory_layer", **{values: None})
    check(r"join them first", **{values: torch.ones(432, 4)})
    pre_values = "transformer.full_memory_layer.pre_values_for_look_up"
    check(
        r"layers times a square of rows",
        **{values: torch.ones(430, 8), pre_values: torch.ones(430, 10)},
    )
    check(r"pre_values_for_look_up must be \[432, width\]", **{pre_values: torch.ones(5, 10)})
    check(
        r"full_memory_layer\.keys is not a name",
        **{"transformer.full_memory_layer.keys": torch.ones(2)},
    )
    check(
        r"mem_blocks\.2 is missing",
        **{"transformer.mem_blocks.3.keys": torch.ones(2)}
        | {name: None for name in published.state_dict(options) if "mem_blocks.2." in name},
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mem_q_for_each_tucker_rank": False}, "mem_q_for_each_tucker_rank must be true"),
        ({"mem_type": "memory_plus"}, "mem_type must be 'ultramem_v2'"),
        ({"layer_norm_type": "default"}, "layer_norm_type must be 'rms'"),
        ({"mem_depth": 3}, "mem_depth is not an option"),
        ({"mem_kdim": 5}, "mem_kdim is 5, by the shapes in source 6"),
        ({"mem_knum": 13}, "mem_knum is 13, by the shapes in source 12"),
        ({"mem_share_ratio": 0.6}, "mem_share_ratio is 0.6, which makes 16 keys"),
        ({"mem_key_expand_time": 3}, "mem_key_expand_time must divide the 14 keys"),
    ],
)
def test_bad_options(overrides: dict[str, Any], message: str) -> None:
    state = published.state_dict(published.options())
    with pytest.raises(ValueError, match=message):
        um.checkpoint.load_release(state, published.options(**overrides))


def test_missing_options_and_files(tmp_path: Path) -> None:
    state = published.state_dict(published.options())
    for name in ("mem_knn", "layer_norm_type"):
        options = published.options()
        del options[name]
        with pytest.raises(ValueError, match=f"{name} must be given"):
            um.checkpoint.load_release(state, options)
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        um.checkpoint.load_release(tmp_path, published.options())
