"""Tables over several processes, on torch.distributed; beside DDP or FSDP2 for the network.

    mesh = init_device_mesh("cuda", (world_size,), mesh_dim_names=("memory",))
    with torch.device("meta"):
        table = um.MemoryTable.from_config(config, dtype=torch.bfloat16, grad_mode="deferred")
    um.parallel.shard_table(table, mesh, by="columns")

docs/parallel.md says which way to choose, and what goes over the wire.
"""

from .placement import replicate_table, shard_table
from .sharding import TableSharding
from .wire import WireBytes, wire_bytes
from .wrappers import ignore_tables_in_ddp, table_parameters

__all__ = [
    "TableSharding",
    "WireBytes",
    "ignore_tables_in_ddp",
    "replicate_table",
    "shard_table",
    "table_parameters",
    "wire_bytes",
]
