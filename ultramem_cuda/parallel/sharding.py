"""How a table lies over the processes of a mesh."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from .._local import local
from ..addressing import SlotAddressing
from ..ops._common import accumulation_cast, cast_for_autocast
from ._columns import ColumnRead, num_pieces
from ._rows import RowRead

if TYPE_CHECKING:
    from ..table import MemoryTable


@dataclasses.dataclass(frozen=True, eq=False)
class TableSharding:
    """What a table knows of the others that hold parts or copies of it.

    Attributes:
        mesh: all processes whose batches together are a step's: gradients are averaged over them.
        by: "columns": every rank of a memory group has some columns of all rows; "rows": all
            columns of some rows; None: everything, a copy.
        shard_dim: which dimension of the mesh is the memory group; None for copies.
        replica_dim: which dimension holds copies of the same part; None where there are none.
    """

    mesh: DeviceMesh
    by: str | None
    shard_dim: int | None
    replica_dim: int | None

    # ---- the mesh ------------------------------------------------------------------------------

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The memory group: the ranks that together hold the table once."""
        return None if self.shard_dim is None else self.mesh.get_group(self.shard_dim)

    @property
    def num_shards(self) -> int:
        return 1 if self.shard_dim is None else self.mesh.size(self.shard_dim)

    @property
    def shard_rank(self) -> int:
        return 0 if self.shard_dim is None else self.mesh.get_local_rank(self.shard_dim)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part."""
        return None if self.replica_dim is None else self.mesh.get_group(self.replica_dim)

    @property
    def num_replicas(self) -> int:
        return 1 if self.replica_dim is None else self.mesh.size(self.replica_dim)

    @property
    def gradient_scale(self) -> float:
        """What makes the sum over all ranks the average that DDP takes of the other gradients."""
        return 1.0 / self.mesh.size()

    @property
    def placements(self) -> list[Placement]:
        """Of the parameters, one for each dimension of the mesh."""
        shard = Shard(1 if self.by == "columns" else 0)
        return [shard if i == self.shard_dim else Replicate() for i in range(self.mesh.ndim)]

    # ---- this rank's part ----------------------------------------------------------------------

    def first_row(self, num_slots: int) -> int:
        """The first row that this rank holds of a table of num_slots."""
        if self.by != "rows":
            return 0
        return min(self.shard_rank * -(-num_slots // self.num_shards), num_slots)

    def local_shape(self, num_slots: int, width: int) -> tuple[int, int]:
        """Rows and columns that this rank holds of a parameter [num_slots, width]."""
        if self.by == "columns":
            return num_slots, width // self.num_shards
        if self.by == "rows":
            first, rows = self.first_row(num_slots), -(-num_slots // self.num_shards)
            return min(rows, num_slots - first), width
        return num_slots, width

    def check_table(self, num_slots: int, widths: dict[str, int]) -> None:
        """Raise where a table cannot be cut so.

        Raises:
            ValueError: columns that the ranks do not divide, or a rank without rows.
        """
        if self.by == "columns":
            for name, width in widths.items():
                if width % self.num_shards:
                    raise ValueError(
                        f"{name}: must be a multiple of the memory group's {self.num_shards} ranks "
                        f"to be sharded by columns, got {width}"
                    )
        elif self.by == "rows" and (self.num_shards - 1) * -(-num_slots // self.num_shards) >= (
            num_slots
        ):
            raise ValueError(
                f"num_slots: must leave each of the {self.num_shards} ranks a row to be sharded "
                f"by rows, got {num_slots}"
            )

    def num_weights(self, num_cores: int) -> int:
        """Weights that a slot has in this rank's factors."""
        return num_pieces(num_cores, self.num_shards) if self.by == "columns" else num_cores

    # ---- reading -------------------------------------------------------------------------------

    @torch.compiler.disable
    def read(
        self,
        table: MemoryTable,
        indices: Tensor,
        scores: Tensor,
        pre_input: Tensor | None,
        *,
        activation: str,
        addressing: SlotAddressing,
        sum_groups: bool,
    ) -> Tensor:
        """``ops.value_ffn`` of a sharded table, for the tokens of this rank.

        Every rank of the memory group must call it for the same number of tokens, layer by layer in
        the same order; with ULTRAMEM_DEBUG=1 in the environment they ask each other first. Nothing
        waits for the device otherwise. Arguments, result and gradients are those of
        ``ops.value_ffn``; with ``grad_mode="deferred"`` the factors of all ranks' tokens are
        appended on each.

        Raises:
            RuntimeError: other ranks bring another number of tokens (ULTRAMEM_DEBUG=1).
            NotImplementedError: a ``main_grad`` of the parameters; dense gradients of copies.
        """
        if pre_input is not None:
            (pre_input,) = cast_for_autocast(pre_input)
        # Deferred gradients reach no parameter: a DTensor would get zeros of its whole size.
        rows = [p if table.factors is None or p is None else p.detach() for p in table.rows()]
        values, pre_values = (local(part) for part in rows)
        scores = accumulation_cast("value_ffn", "scores", scores, values.dtype)
        self._check_gradients(table)
        if os.environ.get("ULTRAMEM_DEBUG") == "1":
            whose = "all ranks of a memory group, to a layer"
            self._check_equal(indices.shape[0], self.shard_group, whose)
        kind = ColumnRead if self.by == "columns" else RowRead
        read = kind(
            sharding=self,
            table=table,
            addressing=addressing,
            activation=activation,
            sum_groups=sum_groups,
            num_selected=indices.shape[1],
            num_cores=scores.shape[2],
            dtype=values.dtype if pre_input is None else pre_input.dtype,
        )
        return read(indices, scores, pre_input, values, pre_values)

    def check_copies(self, num_tokens: int) -> None:
        """Raise where copies of this part hold factors of other numbers of tokens."""
        if self.num_replicas > 1:
            self._check_equal(num_tokens, self.replica_group, "the copies of a table, to a step")

    def _check_equal(self, number: int, group: dist.ProcessGroup | None, whose: str) -> None:
        mine = torch.tensor([number], device=self.device)
        of_all = mine.new_empty(dist.get_world_size(group))
        dist.all_gather_into_tensor(of_all, mine, group=group)
        if (of_all != number).any():
            raise RuntimeError(
                f"table: the same number of tokens must be brought by {whose}, got "
                f"{of_all.tolist()}"
            )

    def _check_gradients(self, table: MemoryTable) -> None:
        if not torch.is_grad_enabled():
            return
        trained = [p for p in (table.values, table.pre_values) if p is not None and p.requires_grad]
        if any(getattr(p, "main_grad", None) is not None for p in trained):
            raise NotImplementedError(
                "table: main_grad is not offered where the table is sharded; use "
                "grad_mode='deferred'"
            )
        if trained and table.factors is None and self.num_replicas > 1:
            raise NotImplementedError(
                "table: dense gradients of copies of a shard are not exchanged; use "
                "grad_mode='deferred', or a mesh of one dimension"
            )

    # ---- what ranks share -----------------------------------------------------------------------

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Adds up, in place, what every rank of the memory group has of its own part."""
        if self.num_shards > 1:
            dist.all_reduce(tensor, group=self.shard_group)
        return tensor

    def max_over_mesh(self, tensor: Tensor) -> Tensor:
        """The largest value on any rank, in place."""
        for dim in range(self.mesh.ndim):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.mesh.get_group(dim))
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """What the mesh's first rank has, in place, on all of them."""
        for dim in range(self.mesh.ndim):
            # First along the outer dimension, among the ranks that are the first of the inner ones.
            dist.broadcast(tensor, group=self.mesh.get_group(dim), group_src=0)
        return tensor

    def draw_seed(self) -> int:
        """A seed for this rank's part: the same for its copies, another for every other part."""
        seed = torch.randint(1 << 32, (1,), device="cpu")
        base = int(self.broadcast(seed.to(self.device)).item())
        # Of 32 bits, which is all that the CPU's generator looks at; an odd factor keeps all apart.
        return (base + 0x9E3779B1 * self.shard_rank) % (1 << 32)

    @property
    def device(self) -> torch.device:
        """This rank's."""
        if self.mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.mesh.device_type)

    def __str__(self) -> str:
        return (
            f"by={self.by!r}, num_shards={self.num_shards}, shard_rank={self.shard_rank}, "
            f"num_replicas={self.num_replicas}"
        )

    # ---- copies --------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> TableSharding:
        # Process groups are no values; a copy of a table lies where the table does.
        return self
