"""Saving with torch.distributed.checkpoint in pieces.

A shard is one chunk of a checkpoint there, and whoever needs a part of a chunk reads all of it: a
table saved by one process would be read whole by each rank that holds a column of it. Here chunks
have a limited size, so that a process holds one of them beside its own shard, when it saves from a
GPU and when it loads.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import find_state_dict_object

PIECE_BYTES = 1 << 25
# Planning takes time with the number of chunks, in some versions with its square.
MAX_PIECES = 1 << 10


class PiecewiseSavePlanner(DefaultSavePlanner):
    """As torch's, for a flat dictionary of tensors, with shards cut along their longest dimension.

    A piece has at most PIECE_BYTES, or 1 / MAX_PIECES of the whole tensor where that is more.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shard_offsets: dict[tuple[str, torch.Size], torch.Size] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(
            plan, items=[piece for item in plan.items for piece in self._pieces(item)]
        )
        return self.plan

    def _pieces(self, item: WriteItem) -> list[WriteItem]:
        data = item.tensor_data
        assert data is not None
        shard, itemsize = data.chunk, data.properties.dtype.itemsize
        limit = max(PIECE_BYTES, math.prod(data.size) * itemsize // MAX_PIECES)
        nbytes = math.prod(shard.sizes) * itemsize
        if nbytes <= limit:
            self._shard_offsets[item.index.fqn, shard.offsets] = shard.offsets
            return [item]
        dim = max(range(len(shard.sizes)), key=lambda d: shard.sizes[d])
        step = max(1, limit // (nbytes // shard.sizes[dim]))
        pieces = []
        for start in range(0, shard.sizes[dim], step):
            offsets, sizes = list(shard.offsets), list(shard.sizes)
            offsets[dim] += start
            sizes[dim] = min(step, sizes[dim] - start)
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            self._shard_offsets[item.index.fqn, chunk.offsets] = shard.offsets
            pieces.append(
                WriteItem(
                    index=MetadataIndex(item.index.fqn, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=dataclasses.replace(data, chunk=chunk),
                )
            )
        return pieces

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        name = write_item.index.fqn
        offsets = self._shard_offsets[name, chunk.offsets]
        piece = find_state_dict_object(self.state_dict, MetadataIndex(name, offsets)).detach()
        for dim, (start, base, size) in enumerate(
            zip(chunk.offsets, offsets, chunk.sizes, strict=True)
        ):
            piece = piece.narrow(dim, start - base, size)
        return piece
