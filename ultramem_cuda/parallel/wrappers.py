"""What DDP and FSDP have to know of tables."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..table import MemoryTable


def table_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that DDP and FSDP must leave alone: those of sharded and of deferred tables.

    For ``fully_shard(model, ignored_params=um.parallel.table_parameters(model))``.
    """
    return {parameter for table in _tables(model).values() for parameter in table.parameters()}


def ignore_tables_in_ddp(model: nn.Module) -> None:
    """Have ``DistributedDataParallel(model)``, made afterwards, leave those tables alone.

    It would wait for gradients that never come, and average what is averaged already.
    """
    names = {
        f"{prefix}.{name}"
        for prefix, table in _tables(model).items()
        for name in table.state_dict()
    }
    # DDP looks for what the root module itself holds with a dot and without.
    names |= {name[1:] for name in names if name.startswith(".")}
    known = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, sorted(names | set(known))
    )


def _tables(model: nn.Module) -> dict[str, MemoryTable]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MemoryTable)
        and (module.grad_mode == "deferred" or module.sharding is not None)
    }
