"""A model as checkpoints know it: names without wrappers, and what its memory layers address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UltraMemConfig
from ..layer import UltraMemLayer
from ..table import MemoryTable

# Fields that neither change which rows are read nor what is made of them: of training alone.
_TRAINING_FIELDS = frozenset(
    {
        "init",
        "ffn_inner_dim",
        "tucker_penalty",
        "tucker_margin",
        "key_balance",
        "key_balance_normalize",
    }
)


def _wrapped_child(module: Any) -> str | None:
    """The attribute that a wrapper keeps the model in, which no name in a checkpoint shows."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        return "_orig_mod"
    if isinstance(module, nn.Module) and "_checkpoint_wrapped_module" in module._modules:
        return "_checkpoint_wrapped_module"
    return None


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or module without DDP, torch.compile and activation
    checkpointing."""
    parts: list[str] = []
    module: Any = model
    for part in name.split(".") if name else []:
        if part != _wrapped_child(module):
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def model_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """What a model's state dict holds, by plain name: the name in the state dict, the tensor.

    Raises:
        TypeError: an entry is not a tensor.
        ValueError: two entries have one plain name, or a tensor has no storage.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model: {name} must be a tensor, got {type(value).__name__}")
        if value.is_meta:
            raise ValueError(f"model: {name} is on the meta device; call to_empty(device=...)")
        plain = plain_name(model, name)
        if plain in found:
            raise ValueError(f"model: {name} and {found[plain][0]} are both called {plain}")
        found[plain] = name, value
    return found


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Plain names of parameters by ``id``; of a parameter with several names the first."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), plain_name(model, name))
    return names


def tables(model: nn.Module) -> dict[str, MemoryTable]:
    """A model's tables, by the prefix of their names: "" or "name."."""
    return {
        f"{plain}." if (plain := plain_name(model, name)) else "": module
        for name, module in model.named_modules()
        if isinstance(module, MemoryTable)
    }


def describe_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Index and configuration of every memory layer, plain data by plain name."""
    return {
        plain_name(model, name): {
            "layer_index": module.layer_index,
            "config": module.config.to_dict(),
        }
        for name, module in model.named_modules()
        if isinstance(module, UltraMemLayer)
    }


def check_layers(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError where a memory layer would make something else of the saved tensors: read
    other rows, or compute with them otherwise."""
    for name, mine in describe_layers(model).items():
        theirs = saved.get(name)
        if theirs is None:
            continue
        differs = _difference(mine, theirs)
        if differs is not None:
            field, saved_value, value = differs
            raise ValueError(
                f"{field}: memory layer {name or 'model'} has {value!r}, the checkpoint was saved "
                f"with {saved_value!r}, so the layer would read other rows or use them otherwise; "
                "check_config=False loads it all the same"
            )


def _difference(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    if mine["layer_index"] != saved["layer_index"]:
        return "layer_index", saved["layer_index"], mine["layer_index"]
    config = UltraMemConfig.from_dict(mine["config"])
    other = UltraMemConfig.from_dict(saved["config"])
    ignored = _TRAINING_FIELDS | {"axis_topk"}
    if config.shuffle != "feistel":  # a permutation is in the state dict
        ignored |= {"seed"}
    for field, value in mine["config"].items():
        saved_value = getattr(other, field)
        if field not in ignored and value != saved_value:
            return field, saved_value, value
    if config.kept_per_axis != other.kept_per_axis:  # which None leaves to others
        return "axis_topk", other.kept_per_axis, config.kept_per_axis
    return None
