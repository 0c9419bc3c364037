"""Optimizers as checkpoints know them: states and options by the names of the parameters.

torch numbers the parameters of an optimizer; names survive another order, another sharding and
another number of processes. torch.distributed.checkpoint.state_dict goes by names as well, but
makes missing states by a step with gradients of zeros, which would be as large as the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim.memory import MemoryOptimizer

_MASTER_SCALE = "master_scale"


def state_name(parameter: str, state: str) -> str:
    return f"optimizer.{parameter}.{state}"


def named_groups(
    optimizers: Sequence[Optimizer], names: Mapping[int, str]
) -> list[list[list[str]]]:
    """The names of the parameters of each group of each optimizer.

    Raises:
        ValueError: a parameter is not the model's, or two optimizers have it.
    """
    seen: set[str] = set()
    found: list[list[list[str]]] = []
    for optimizer in optimizers:
        groups = []
        for group in optimizer.param_groups:
            group_names = []
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is None:
                    raise ValueError(
                        f"optimizer: a parameter of {type(optimizer).__name__} of shape "
                        f"{list(parameter.shape)} is not one of the model"
                    )
                if name in seen:
                    raise ValueError(f"optimizer: {name} is in two optimizers")
                seen.add(name)
                group_names.append(name)
            groups.append(group_names)
        found.append(groups)
    return found


def describe(
    optimizers: Sequence[Optimizer], names: Mapping[int, str]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """(the tensors of the states, by name; all else, plain data for JSON)."""
    tensors: dict[str, Tensor] = {}
    records = []
    for optimizer, groups in zip(optimizers, named_groups(optimizers, names), strict=True):
        state_dict = optimizer.state_dict()
        states: dict[str, dict[str, Any]] = {}
        for number, name in _numbered(state_dict, groups):
            if number not in state_dict["state"]:
                continue
            state = states[name] = {"tensors": [], "values": {}}
            for key, value in state_dict["state"][number].items():
                if isinstance(value, Tensor):
                    state["tensors"].append(key)
                    tensors[state_name(name, key)] = value
                else:
                    state["values"][key] = _encoded(f"{name}.{key}", value)
        options = [
            {key: _encoded(key, value) for key, value in group.items() if key != "params"}
            for group in state_dict["param_groups"]
        ]
        records.append(
            {
                "class": type(optimizer).__name__,
                "groups": [
                    {"params": params, "options": chosen}
                    for params, chosen in zip(groups, options, strict=True)
                ],
                "states": states,
            }
        )
    return tensors, records


def _numbered(
    state_dict: Mapping[str, Any], groups: Sequence[Sequence[str]]
) -> Iterator[tuple[Any, str]]:
    for group, names in zip(state_dict["param_groups"], groups, strict=True):
        # param_groups of torch may keep names of their own, under the key "param_names".
        yield from zip(group["params"], names, strict=True)


def _encoded(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"optimizer: {name} must have one element, got {list(value.shape)}")
        return value.item()
    if isinstance(value, torch.dtype):
        return {"torch.dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [_encoded(name, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"optimizer: {name} cannot be saved, it is a {type(value).__name__}")


def _decoded(value: Any, current: Any) -> Any:
    """What was saved, as the kind of thing that is there now: JSON has neither tuples nor
    tensors."""
    if isinstance(value, Mapping):
        return getattr(torch, value["torch.dtype"])
    if isinstance(current, Tensor):
        return torch.full_like(current, value)
    if isinstance(value, list):
        items = [_decoded(item, None) for item in value]
        return items if isinstance(current, list) else tuple(items)
    return value


@dataclasses.dataclass
class Restoration:
    """What is to become of one optimizer: made and checked before anything is changed.

    Attributes:
        targets: tensors to read into, by name in the checkpoint.
    """

    optimizer: Optimizer
    options: list[dict[str, Any]]
    states: dict[Tensor, dict[str, Any]]
    targets: dict[str, Tensor]

    def apply(self) -> None:
        """Hand what was read over to the optimizer."""
        if isinstance(self.optimizer, MemoryOptimizer):
            # Its load_state_dict copies, and would hold every state twice for a while.
            self.optimizer.state.clear()
            self.optimizer.state.update(self.states)
            for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
                group.update(options)
            return
        state_dict = self.optimizer.state_dict()
        state_dict["state"] = {}
        for group, numbered, options in zip(
            self.optimizer.param_groups, state_dict["param_groups"], self.options, strict=True
        ):
            numbered.update(options)
            for parameter, number in zip(group["params"], numbered["params"], strict=True):
                if parameter in self.states:
                    state_dict["state"][number] = self.states[parameter]
        self.optimizer.load_state_dict(state_dict)


def restorations(
    optimizers: Sequence[Optimizer],
    names: Mapping[int, str],
    records: Sequence[Mapping[str, Any]],
    saved: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> list[Restoration]:
    """One for each optimizer.

    Args:
        optimizers, names: as for :func:`describe`.
        records: what :func:`describe` returned when the checkpoint was saved.
        saved: shape and dtype of every tensor of the checkpoint.

    Raises:
        ValueError: other optimizers, groups or states than were saved.
    """
    if not records:
        raise ValueError("optimizer: the checkpoint was saved without one")
    if len(records) != len(optimizers):
        raise ValueError(
            f"optimizer: the checkpoint has the states of {len(records)}, got {len(optimizers)}"
        )
    made = []
    all_groups = named_groups(optimizers, names)
    for optimizer, groups, record in zip(optimizers, all_groups, records, strict=True):
        _check_groups(optimizer, groups, record)
        made.append(_restoration(optimizer, groups, record, saved))
    return made


def _check_groups(
    optimizer: Optimizer, groups: Sequence[Sequence[str]], record: Mapping[str, Any]
) -> None:
    kind = type(optimizer).__name__
    if kind != record["class"]:
        raise ValueError(f"optimizer: the checkpoint has states of {record['class']}, got a {kind}")
    saved = [group["params"] for group in record["groups"]]
    if len(saved) != len(groups):
        raise ValueError(f"optimizer: {kind} was saved with {len(saved)} groups, got {len(groups)}")
    for index, (theirs, mine) in enumerate(zip(saved, groups, strict=True)):
        differing = sorted(set(theirs) ^ set(mine))
        if differing:
            where = "the checkpoint" if differing[0] in theirs else "the optimizer"
            raise ValueError(
                f"optimizer: group {index} of {kind} has {differing[0]} in {where} alone"
            )


def _restoration(
    optimizer: Optimizer,
    groups: Sequence[Sequence[str]],
    record: Mapping[str, Any],
    saved: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> Restoration:
    result = Restoration(optimizer, [], {}, {})
    for group, names, saved_group in zip(
        optimizer.param_groups, groups, record["groups"], strict=True
    ):
        options = {
            key: _decoded(value, group.get(key)) for key, value in saved_group["options"].items()
        }
        result.options.append(options)
        for parameter, name in zip(group["params"], names, strict=True):
            state = record["states"].get(name)
            if state is None:
                continue
            layout = {key: saved[state_name(name, key)] for key in state["tensors"]}
            tensors = _state_tensors(optimizer, parameter, {**group, **options}, name, layout)
            result.targets |= {state_name(name, key): value for key, value in tensors.items()}
            result.states[parameter] = {**state["values"], **tensors}
    return result


def _state_tensors(
    optimizer: Optimizer,
    parameter: Tensor,
    group: dict[str, Any],
    name: str,
    layout: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> dict[str, Tensor]:
    """Tensors to read a parameter's states into, those that it has where they fit."""
    present = {k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, Tensor)}
    extra = {}
    if isinstance(optimizer, MemoryOptimizer):
        if _MASTER_SCALE in layout:
            extra[_MASTER_SCALE] = torch.ones((), dtype=torch.float64)
        present.pop(_MASTER_SCALE, None)
        layout = {key: value for key, value in layout.items() if key != _MASTER_SCALE}
    if _layout(present) != layout:
        if isinstance(optimizer, MemoryOptimizer):
            present = optimizer._new_state(parameter, group)
        else:
            present = {key: _empty_state(parameter, *value) for key, value in layout.items()}
    for key in layout.keys() | present.keys():
        mine, theirs = _layout(present).get(key), layout.get(key)
        if mine != theirs:
            raise ValueError(
                f"optimizer: the state {key} of {name} is {_shown(theirs)} in the checkpoint and "
                f"{_shown(mine)} in {type(optimizer).__name__}"
            )
    return present | extra


def _layout(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in state.items()}


def _shown(layout: tuple[torch.Size, torch.dtype] | None) -> str:
    return "missing" if layout is None else f"{layout[1]} {list(layout[0])}"


def _empty_state(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    # A count of steps, which torch keeps on the CPU and moves where an optimizer wants it.
    device = "cpu" if len(shape) == 0 else parameter.device
    return torch.zeros(shape, dtype=dtype, device=device)
