"""The rows that a layer's virtual indices stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library, nvtx
from ..addressing import SlotAddressing
from ._checks import ArgumentChecks
from ._common import register


@nvtx.annotate("ultramem::value_slots fwd")
def value_slots(
    indices: Tensor,
    placement: Tensor,
    *,
    addressing: SlotAddressing,
    with_groups: bool = False,
) -> Tensor:
    """Virtual indices to rows of the table, with offset and seed from a tensor.

    `value_ffn` does the same by itself where it is given the addressing, whose offset and seed are
    then numbers of the call: constants under torch.compile, which compiles one program for each.
    Here they are data, and one program serves all layers of a model.

    Args:
        indices: int64 or int32 of any shape, in [0, expand * window).
        placement: int64 [2] on the device of indices, ``addressing.placement(device)``.
        addressing: what all those layers share: its offset and seed are not looked at.
        with_groups: tell groups apart.

    Returns:
        int64 of the shape of indices: slot, which `value_ffn` takes without addressing; with_groups
        num_slots * group + slot, which it takes with ``SlotAddressing(num_slots, num_slots,
        expand=expand)``. -1 where an index is out of range.
    """
    _library.require(indices.device.type)
    shuffle = addressing.shuffle
    permutation = shuffle if isinstance(shuffle, Tensor) else None
    slots: Tensor = torch.ops.ultramem.value_slots(
        indices,
        placement,
        permutation,
        addressing.num_slots,
        addressing.window,
        addressing.expand,
        "permutation" if isinstance(shuffle, Tensor) else shuffle or "none",
        addressing.num_keys,
        with_groups,
    )
    return slots


def _value_slots_fake(
    indices: Tensor,
    placement: Tensor,
    permutation: Tensor | None,
    num_slots: int,
    window: int,
    expand: int,
    shuffle: str,
    num_keys: int,
    with_groups: bool,
) -> Tensor:
    checks = ArgumentChecks("value_slots", "indices", indices)
    checks.check(indices.dtype in (torch.int64, torch.int32), "indices must be int64 or int32")
    checks.shape("placement", placement, "[2]", (2,))
    checks.has_dtype("placement", placement, torch.int64)
    checks.check(window >= 1, f"window must be positive, got {window}")
    if permutation is not None:
        checks.shape("permutation", permutation, "[expand * window]", (expand * window,))
        checks.has_dtype("permutation", permutation, torch.int64)
    return indices.new_empty(indices.shape, dtype=torch.int64)


if _library.is_loaded():
    register("value_slots", _value_slots_fake)
