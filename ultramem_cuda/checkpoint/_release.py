"""Weights of the code published with UltraMemV2 (github.com/ZihaoHuang-notabot/
Ultra-Sparse-Memory-Network), for the modules of this package.

What that code computes differs from the paper in places; what is said of it here is read off its
``olmo/ultramem_layer_v2.py``:

- The query projection makes ``[2 groups, 2 * Kd]`` of a token; heads 0 and 1 take the first group,
  heads 2 and 3 the second. Its first Kd are the query of the rows, the others that of the columns,
  and both Tucker ranks use them: one query a side here (``query_per_rank=False``).
- Keys are ``[heads, 2, n, Kd, ranks]``; here ranks come before n.
- The axes are filtered by buffers ``tucker_core_u`` and ``tucker_core_v``, whose sign is whatever
  the first SVD gave, kept from step to step. Here it is canonical; where the two differ, the row
  and column keys of that head are negated, which leaves scores as they are and flips the filter.
- Keys per side are ``key_expand * floor(sqrt(N * share_ratio))``, a layer's window begins at row
  ``layer * N / layers`` and wraps around, and ``shuffle_index`` permutes the virtual indices first.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..addressing import SlotAddressing
from ..config import UltraMemConfig

_TABLE = "full_memory_layer."
_LAYERS = "mem_blocks."
_VALUES = _TABLE + "values_for_look_up"
_TABLE_NAMES = {"values_for_look_up": "values", "pre_values_for_look_up": "pre_values"}

# The options that say what is computed, with the defaults of the published configuration; those
# without one must be given.
_REQUIRED = object()
_OPTIONS: dict[str, Any] = {
    "layer_norm_type": _REQUIRED,
    "mem_knn": _REQUIRED,
    "layer_norm_eps": 1e-5,
    "mem_key_expand_time": 1,
    "mem_use_glu_act": False,
}
# Those that the shapes say already: compared where they are given.
_SHAPE_OPTIONS = (
    "d_model",
    "mem_knum",
    "mem_kdim",
    "mem_vdim",
    "mem_pre_vdim",
    "mem_head",
    "mem_share_ratio",
    "mem_value_expand_time",
)
# Of training, or without effect.
_IGNORED_OPTIONS = {
    "mem_insert_way",
    "mem_tucker_rank_penalty",
    "mem_log_interval",
    "mem_key_balance_reg_coef",
    "mem_final_top_expand_time",
    "mem_output_dropout_rate",
    "mem_parallel_size",
}
# A buffer is one step older than the cores beside it: nearly, not exactly, their singular vector.
_LEAST_COSINE = 0.9


@dataclasses.dataclass(frozen=True)
class ReleasedMemory:
    """What :func:`load_release` made.

    Attributes:
        config: of the layers and their table.
        table: state dict of ``MemoryTable.from_config(config)``. The tensors are those that were
            given; nothing of the table is copied.
        layers: state dict of ``UltraMemLayer(config, i)`` for each i.
    """

    config: UltraMemConfig
    table: dict[str, Tensor]
    layers: list[dict[str, Tensor]]


def load_release(
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    prefix: str | None = None,
) -> ReleasedMemory:
    """Weights of the published code for :class:`MemoryTable` and :class:`UltraMemLayer`.

    The layers compute the same, up to rounding. Dropout of the outputs, the one thing they do not
    have, is of training.

    Args:
        source: the state dict of the whole model; or its file, ``.pt`` or ``.safetensors``, or the
            directory with ``model.pt``. Files are mapped into memory, not read.
        config: the options of the model there, those under "model" in its ``config.yaml``;
            "mem_knn" and "layer_norm_type" at least. Options not of memory layers are passed over.
        prefix: of the names ``mem_blocks.0.keys`` and so on; by default it is looked for.
            Elsewhere it is "transformer.".

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: naming what is missing, unknown or inconsistent among names, shapes
            and options; or what the published code computes and this package does not.
    """
    state_dict = source if isinstance(source, Mapping) else _read(Path(source))
    options = _options(config)
    prefix = _find_prefix(state_dict) if prefix is None else prefix
    table = _table(state_dict, prefix)
    layers = _layers(state_dict, prefix)
    our_config = _config(options, table, layers, config)
    return ReleasedMemory(
        our_config,
        table,
        [_layer(index, weights, our_config) for index, weights in enumerate(layers)],
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        path = path / "model.pt"
    if not path.exists():
        raise FileNotFoundError(f"source: no file at {path}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(
                "load_release needs the package safetensors for such files: "
                "pip install 'ultramem_cuda[safetensors]'"
            ) from None
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {*_OPTIONS, *_SHAPE_OPTIONS, *_IGNORED_OPTIONS}
    known |= {"mem_type", "mem_q_for_each_tucker_rank"}
    for name in config:
        if name.startswith("mem_") and name not in known:
            raise ValueError(f"config: {name} is not an option of the published code")
    if config.get("mem_type", "ultramem_v2") != "ultramem_v2":
        raise ValueError(f"config: mem_type must be 'ultramem_v2', got {config['mem_type']!r}")
    if not config.get("mem_q_for_each_tucker_rank", True):
        raise ValueError(
            "config: mem_q_for_each_tucker_rank must be true: with false the published code fails, "
            "since half of a query of its projection does not have the width of a key"
        )
    options = {name: config.get(name, default) for name, default in _OPTIONS.items()}
    for name, value in options.items():
        if value is _REQUIRED:
            raise ValueError(f"config: {name} must be given")
    if options["layer_norm_type"] != "rms":
        raise ValueError(
            f"config: layer_norm_type must be 'rms', got {options['layer_norm_type']!r}, which "
            "subtracts the mean of queries and keys"
        )
    return options


def _find_prefix(state_dict: Mapping[str, Tensor]) -> str:
    found = [name.removesuffix(_VALUES) for name in state_dict if name.endswith(_VALUES)]
    if len(found) != 1:
        raise ValueError(
            f"source: one name must end in {_VALUES}, got {len(found)} that do; prefix= chooses"
        )
    return found[0]


def _table(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + _TABLE
    table = {}
    for name, tensor in state_dict.items():
        if name.startswith(start):
            short = _TABLE_NAMES.get(name.removeprefix(start))
            if short is None:
                raise ValueError(f"source: {name} is not a name of the published code")
            table[short] = tensor
    if "values" not in table:
        raise ValueError(f"source: {prefix}{_VALUES} is missing")
    for name, tensor in table.items():
        if tensor.dim() != 2 or tensor.shape[0] != table["values"].shape[0]:
            raise ValueError(
                f"source: {start}{name}_for_look_up must be [{table['values'].shape[0]}, width], "
                f"got {list(tensor.shape)}"
            )
    return table


def _layers(state_dict: Mapping[str, Tensor], prefix: str) -> list[dict[str, Tensor]]:
    start = prefix + _LAYERS
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        if name.startswith(start):
            match = re.fullmatch(r"(\d+)\.(.+)", name.removeprefix(start))
            if match is None:
                raise ValueError(f"source: {name} is not a name of the published code")
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not found:
        raise ValueError(f"source: has no {start}0")
    for index in range(len(found)):
        if index not in found:
            raise ValueError(f"source: {start}{index} is missing, of {len(found)} layers")
    return [found[index] for index in range(len(found))]


def _config(
    options: Mapping[str, Any],
    table: Mapping[str, Tensor],
    layers: list[dict[str, Tensor]],
    given: Mapping[str, Any],
) -> UltraMemConfig:
    """The configuration that options and shapes give, once they are known to agree."""
    first = layers[0]
    for name in ("keys", "values_proj.weight"):
        if name not in first:
            raise ValueError(f"source: {_LAYERS}0.{name} is missing")
    keys, num_layers = first["keys"], len(layers)
    if keys.dim() != 5 or keys.shape[1] != 2 or keys.shape[4] != 2:
        raise ValueError(
            f"source: {_LAYERS}0.keys must be [heads, 2, keys, width, 2], got {list(keys.shape)}"
        )
    heads, _, num_keys, key_dim, rank = keys.shape
    if heads > 4:
        raise ValueError(f"source: the published code has at most 4 heads, got keys of {heads}")
    num_slots, value_dim = table["values"].shape
    pre_value_dim = table["pre_values"].shape[1] if "pre_values" in table else 0
    d_model, value_width = first["values_proj.weight"].shape
    key_expand = options["mem_key_expand_time"]
    expand = key_expand**2
    own = math.isqrt(num_slots // num_layers)
    if own**2 * num_layers != num_slots:
        raise ValueError(
            f"source: {_VALUES} must have layers times a square of rows, got {num_slots} rows for "
            f"{num_layers} layers"
        )
    if num_keys % key_expand:
        raise ValueError(
            f"config: mem_key_expand_time must divide the {num_keys} keys, got {key_expand}"
        )
    if value_width not in (value_dim, expand * value_dim):
        raise ValueError(
            f"source: {_LAYERS}0.values_proj.weight has {value_width} columns, which is neither "
            f"the {value_dim} of {_VALUES} nor that times mem_key_expand_time^2 = {expand}; where "
            "each rank of a job saved its own columns of the table, join them first"
        )
    from_shapes = {
        "d_model": d_model,
        "mem_knum": own,
        "mem_kdim": key_dim,
        "mem_vdim": value_dim,
        "mem_pre_vdim": pre_value_dim,
        "mem_head": heads,
        "mem_value_expand_time": value_width // value_dim,
    }
    for name, value in from_shapes.items():
        if given.get(name, value) != value:
            raise ValueError(f"config: {name} is {given[name]}, by the shapes in source {value}")
    if "mem_share_ratio" in given:
        ratio = given["mem_share_ratio"]
        wanted = key_expand * int((num_slots * ratio) ** 0.5)
        if wanted != num_keys:
            raise ValueError(
                f"config: mem_share_ratio is {ratio}, which makes {wanted} keys, but those of "
                f"source are {num_keys}"
            )
    return UltraMemConfig(
        d_model=d_model,
        num_layers=num_layers,
        num_keys=num_keys,
        key_dim=key_dim,
        num_slots=num_slots,
        value_dim=value_dim,
        pre_value_dim=pre_value_dim,
        num_heads=heads,
        tucker_rank=rank,
        num_cores=sum(name.startswith("tucker_core.") for name in first),
        topk=options["mem_knn"],
        axis_topk=options["mem_knn"],
        query_per_rank=False,
        activation="gelu" if options["mem_use_glu_act"] and pre_value_dim else "identity",
        key_expand=key_expand,
        sum_groups=value_width == value_dim,
        topology="ring",
        shuffle="permutation",
        eps=options["layer_norm_eps"],
    )


def _expected_shapes(config: UltraMemConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer in the published code."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {
        "query_proj.weight": (2 * c.tucker_rank * c.key_dim, c.d_model),
        "keys": (c.num_heads, 2, c.num_keys, c.key_dim, c.tucker_rank),
        "values_proj.weight": (c.d_model, c.output_groups * c.value_dim),
        "query_norm.weight": (c.key_dim,),
        "keys_norm.weight": (c.key_dim,),
        "shuffle_index": (c.num_keys**2,),
        "tucker_core_u": (1, c.num_heads, 1, c.tucker_rank),
        "tucker_core_v": (1, c.num_heads, 1, c.tucker_rank),
    }
    if c.pre_value_dim:
        shapes["pre_values_proj.weight"] = (c.pre_value_dim, c.d_model)
    for core in range(c.num_cores):
        shapes[f"tucker_core.{core}"] = (c.num_heads, c.tucker_rank, c.tucker_rank)
    return shapes


def _layer(index: int, weights: Mapping[str, Tensor], config: UltraMemConfig) -> dict[str, Tensor]:
    """A layer's weights as :class:`UltraMemLayer` has them."""
    shapes = _expected_shapes(config)
    place = f"{_LAYERS}{index}"
    if weights.keys() - shapes.keys():
        name = min(weights.keys() - shapes.keys())
        raise ValueError(f"source: {place}.{name} is not a name of the published code here")
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(f"source: {place}.{name} is missing")
        if tuple(weights[name].shape) != shape:
            got = list(weights[name].shape)
            raise ValueError(f"source: {place}.{name} must be {list(shape)}, got {got}")
    try:
        SlotAddressing(config.num_slots, config.window, 0, config.expand, weights["shuffle_index"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"source: {place}.shuffle_index: {error}") from None
    cores = torch.stack([weights[f"tucker_core.{i}"] for i in range(config.num_cores)])
    sign = _filter_sign(place, cores, weights["tucker_core_u"], weights["tucker_core_v"])
    keys = weights["keys"].permute(0, 1, 4, 2, 3)
    group = torch.arange(config.num_heads) // 2
    query = weights["query_proj.weight"].unflatten(0, (2, 2, config.key_dim))[group]
    state = {
        "query_proj.weight": query.transpose(0, 1).flatten(0, 2).contiguous(),
        "query_norm": weights["query_norm.weight"],
        "keys": (keys * sign.to(keys.dtype)[:, None, None, None, None]).contiguous(),
        "key_norm": weights["keys_norm.weight"],
        "cores": cores,
        "value_proj.weight": weights["values_proj.weight"],
        "shuffle_index": weights["shuffle_index"],
    }
    if config.pre_value_dim:
        state["pre_proj.weight"] = weights["pre_values_proj.weight"]
    return state


def _filter_sign(place: str, cores: Tensor, buffer_u: Tensor, buffer_v: Tensor) -> Tensor:
    """[heads], -1 where the filter's sign there is not the canonical one of ``ops.tucker_filter``.

    Before its first step the buffers are zero and say nothing.
    """
    u, v, _ = ops.tucker_filter(cores.detach().float())
    theirs = torch.stack([buffer_u[0, :, 0], buffer_v[0, :, 0]]).float()
    trained = theirs.abs().sum((0, 2)) > 0
    cosines = torch.cosine_similarity(torch.stack([u, v]), theirs, dim=2)
    sign = torch.where(cosines.sum(0) < 0, -1.0, 1.0)
    off = trained & ((cosines * sign).min(0).values < _LEAST_COSINE)
    if off.any():
        head = int(off.nonzero()[0])
        raise ValueError(
            f"source: {place}.tucker_core_u and tucker_core_v of head {head} must be the leading "
            "singular vectors of the sum of its cores, up to a common sign; their cosines with "
            f"those are {cosines[0, head]:.3f} and {cosines[1, head]:.3f}"
        )
    return sign
