"""The same bytes by the model, by NVML and by Nsight Compute, of operators that are simple."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .instruments import Windows, free_memory
from .nsight import ncu, ncu_csv, targets
from .nsight.ncu_csv import NcuError
from .record import Agreement, Bytes

__all__ = ["SHAPE", "TOKENS", "by_ncu", "by_nvml"]

SHAPE = "M"
TOKENS = 8192
_PASSES = 3
_TOLERANCE = 0.15


@dataclasses.dataclass(frozen=True)
class Counted:
    """A target's bytes of one pass, by the model and, where there is any, by NVML."""

    row: Agreement
    model: Bytes


def by_nvml(
    name: str,
    windows: Windows | None,
    device: torch.device,
    *,
    shape: str = SHAPE,
    tokens: int = TOKENS,
) -> Counted:
    """Builds a target and watches it run.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    try:
        return _watched(name, windows, device, shape, tokens)
    finally:
        free_memory(device)


def _watched(
    name: str, windows: Windows | None, device: torch.device, shape: str, tokens: int
) -> Counted:
    target = targets.TARGETS[name](targets.SHAPES[shape], tokens, device)
    nvml, note = None, ""
    if windows is not None:
        found = windows.measure(target.run)
        nvml, note = found.sampled.bytes, " ".join(f"{note}." for note in found.notes)
    return Counted(Agreement(name, target.model_bytes, nvml, None, note=note), target.model)


def by_ncu(
    counted: Sequence[Counted],
    note: Callable[[str], None],
    *,
    shape: str = SHAPE,
    tokens: int = TOKENS,
) -> Iterator[Counted]:
    """The same with what ncu counts, in processes of their own that need memory on the GPU.

    Where ncu refuses the first it is not asked for the others: the machine does not have it, or
    does not let it.
    """
    refused = False
    for index, one in enumerate(counted):
        row = one.row
        if not refused:
            try:
                row = _with_ncu(one, shape, tokens)
            except NcuError as error:
                refused = index == 0
                note(str(error) if refused else f"{row.what}: {error}")
        yield dataclasses.replace(one, row=row)


def _with_ncu(counted: Counted, shape: str, tokens: int) -> Agreement:
    row = counted.row
    with tempfile.TemporaryDirectory(prefix="ultramem-ncu-") as folder:
        kernels = ncu.kernels_of(
            row.what,
            log_file=Path(folder) / "ncu.csv",
            shape=shape,
            tokens=tokens,
            passes=_PASSES,
        )
    found = ncu_csv.agreement(row.what, kernels, passes=_PASSES, model=counted.model, nvml=row.nvml)
    return dataclasses.replace(found, model=row.model, note=row.note)


def explained(counted: Counted) -> Agreement:
    """The row; where counts lie apart and the model's two bounds say why, with that reason."""
    row, model = counted.row, counted.model
    measured = [count for count in (row.nvml, row.ncu) if count is not None]
    apart = any(abs(count / row.model - 1) > _TOLERANCE for count in measured)
    within = all(
        model.lower * (1 - _TOLERANCE) <= count <= model.upper * (1 + _TOLERANCE)
        for count in measured
    )
    if not (apart and within):
        return row
    reason = (
        f"Between the model's bounds, {model.lower / 1e6:,.0f} MB with each row or expert once and "
        f"{model.upper / 1e6:,.0f} MB with every use: some repeats are found in a cache."
    )
    return dataclasses.replace(row, note=" ".join(filter(None, (row.note, reason))))
