"""One collective for all that ranks have to tell each other at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Sections begin on whole vectors, so that kernels read them as such.
_ALIGNMENT = 16


class Section(NamedTuple):
    """A tensor of every parcel."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Parcels:
    """Typed tensors, the same for every rank, in one piece of memory a rank: uint8 [P, bytes].

    Args:
        num_ranks: P, parcels.
        sections: the tensors of a parcel.
        device: of the memory.
    """

    def __init__(self, num_ranks: int, sections: list[Section], device: torch.device) -> None:
        self.sections = sections
        self._begins = [0]
        for section in sections:
            nbytes = math.prod(section.shape) * section.dtype.itemsize
            self._begins.append(self._begins[-1] + -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
        self.memory = torch.empty(num_ranks, self._begins[-1], dtype=torch.uint8, device=device)

    def __getitem__(self, section: int) -> Tensor:
        """That section of all parcels, a view [P, *shape]."""
        shape, dtype = self.sections[section]
        begin = self._begins[section]
        nbytes = math.prod(shape) * dtype.itemsize
        return self.memory[:, begin : begin + nbytes].view(dtype).unflatten(1, shape)

    def _like(self, num_ranks: int) -> Parcels:
        return Parcels(num_ranks, self.sections, self.memory.device)

    def exchange(self, group: dist.ProcessGroup) -> Parcels:
        """Parcel r goes to rank r; parcel q of the result came from rank q."""
        received = self._like(self.memory.shape[0])
        dist.all_to_all_single(received.memory, self.memory, group=group)
        return received

    def gather(self, group: dist.ProcessGroup) -> Parcels:
        """The single parcel goes to all ranks; parcel q of the result is rank q's."""
        received = self._like(dist.get_world_size(group))
        dist.all_gather_into_tensor(received.memory, self.memory, group=group)
        return received


def exchange_columns(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, *, P*w] to [P*T, *, w]: of the tokens of all ranks the columns that are this rank's."""
    num_ranks = dist.get_world_size(group)
    send = rows.unflatten(-1, (num_ranks, -1)).movedim(-2, 0).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.flatten(0, 1)


def return_columns(columns: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P*T, *, w] to [T, *, P*w]: of this rank's tokens the columns of all ranks."""
    send = columns.unflatten(0, (dist.get_world_size(group), -1)).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.movedim(0, -2).flatten(-2)


def return_sum(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P*T, *] to [T, *]: of this rank's tokens the sum over ranks, rounded once.

    Partial sums travel in their own dtype and are added in float32, in the order of the ranks: a
    reduction on the way would round bfloat16 at every rank.
    """
    send = partial.unflatten(0, (dist.get_world_size(group), -1)).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.sum(0)


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, *] to [P*T, *]: the tokens of all ranks."""
    rows = rows.contiguous()
    gathered = rows.new_empty((dist.get_world_size(group) * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows, group=group)
    return gathered
