"""What the ranks of the tests run, and the same in one process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ultramem_cuda as um
from ultramem_cuda.examples.lm.config import ModelConfig
from ultramem_cuda.examples.lm.model import ByteLM

TOKENS = 6  # of a rank


# ---- layers --------------------------------------------------------------------------------------


def layer_config(**changes: Any) -> um.UltraMemConfig:
    fields: dict[str, Any] = {
        "d_model": 16,
        "num_layers": 2,
        "num_keys": 12,
        "key_dim": 8,
        "topk": 6,
        "axis_topk": 6,
        "num_slots": 203,
        "pre_value_dim": 8,
        "value_dim": 48,
    }
    return um.UltraMemConfig.from_dict({**fields, **changes})


class Memory(nn.Module):
    """Layers on one table."""

    def __init__(
        self, config: um.UltraMemConfig, grad_mode: str, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = um.MemoryTable.from_config(config, dtype=dtype, grad_mode=grad_mode)
        self.layers = nn.ModuleList(
            um.UltraMemLayer(config, i, dtype=dtype) for i in range(config.num_layers)
        )
        # Values at which activations differ from straight lines.
        with torch.no_grad():
            for parameter in self.table.parameters():
                parameter.mul_(20)
        self.to(device)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, self.table)
        return x


def batch(num_ranks: int, dtype: torch.dtype, device: str, width: int = 16) -> Tensor:
    """The tokens of all ranks, [P, T, D]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_ranks, TOKENS, width, generator=generator, dtype=torch.float64)
    return x.to(device, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def mesh_of(device_type: str, shape: tuple[int, ...]) -> DeviceMesh:
    names = ("copies", "memory")[-len(shape) :]
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


@dataclasses.dataclass
class Gradients:
    """Of a loss that is a mean over ranks."""

    out: Tensor  # of all ranks' tokens
    x: Tensor
    network: dict[str, Tensor]
    table: list[Tensor]

    def to_cpu(self) -> Gradients:
        network = {name: grad.cpu() for name, grad in self.network.items()}
        return Gradients(self.out.cpu(), self.x.cpu(), network, [t.cpu() for t in self.table])


def table_gradients(table: um.MemoryTable) -> list[Tensor]:
    """Dense, of the rows and columns that are here, as the optimizers would take them."""
    if table.factors is not None:
        scale = 1.0 if table.sharding is None else table.sharding.gradient_scale
        return [grad * scale for grad in table.factors.to_dense() if grad is not None]
    return [p.grad for p in table.parameters() if p.grad is not None]


def layer_gradients(
    num_ranks: int, config: um.UltraMemConfig, grad_mode: str, dtype: torch.dtype, device: str
) -> Gradients:
    """In one process."""
    model = Memory(config, grad_mode, dtype, device)
    x = batch(num_ranks, dtype, device).requires_grad_()
    out = torch.stack([model(part) for part in x])
    out.double().square().sum(2).mean().backward()
    assert x.grad is not None
    network = {n: p.grad for n, p in model.layers.named_parameters() if p.grad is not None}
    return Gradients(out.detach(), x.grad, network, table_gradients(model.table)).to_cpu()


def sharded_layer_gradients(
    config: um.UltraMemConfig, by: str, grad_mode: str, dtype: torch.dtype, device: str
) -> Gradients:
    """On the ranks of a memory group, put together."""
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    model = Memory(config, grad_mode, dtype, device)
    um.parallel.shard_table(model.table, mesh_of(device, (num_ranks,)), by=by)
    x = batch(num_ranks, dtype, device)[rank].requires_grad_()
    out = model(x)
    out.double().square().sum(1).mean().backward()
    assert x.grad is not None
    network = {}
    for name, parameter in model.layers.named_parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            network[name] = parameter.grad / num_ranks
    gathered = [whole(t.detach(), 0) for t in (out[None], x.grad[None] / num_ranks)]
    table = table_gradients(model.table)
    dim = 1 if by == "columns" else 0
    tables = [whole(g.to_local() if isinstance(g, DTensor) else g, dim) for g in table]
    return Gradients(gathered[0], gathered[1], network, tables).to_cpu()


def whole(part: Tensor, dim: int) -> Tensor:
    """Parts of all ranks, of different sizes, side by side."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part.cpu())
    return torch.cat(parts, dim)


# ---- the example's language model ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Training:
    """A run of the example's model."""

    by: str = "columns"
    network: str = "ddp"
    optimizer: str = "MemoryAdam"
    grad_mode: str = "deferred"
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    copies: int = 1
    steps: int = 50
    max_norm: float = 0.5
    weight_decay: float = 0.1
    pre_value_dim: int = 8


@dataclasses.dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    table: dict[str, Tensor]


def language_model(run: Training) -> ByteLM:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16,
        num_layers=2,
        attention_heads=2,
        context=8,
        ffn_inner=24,
        num_keys=8,
        key_dim=8,
        topk=4,
        pre_value_dim=run.pre_value_dim,
        value_dim=16,
    )
    model = ByteLM(config)
    assert model.table is not None
    if run.grad_mode == "deferred":
        rows = model.table.state_dict()
        model.table = um.MemoryTable(
            model.table.num_slots,
            model.table.value_dim,
            model.table.pre_value_dim,
            grad_mode="deferred",
        )
        model.table.load_state_dict({**rows, "scale": torch.ones(2, dtype=torch.float64)})
    return model.to(run.device, run.dtype)


def text(step: int, num_ranks: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all ranks, [P, B, L]; a few batches that come again and again."""
    generator = torch.Generator().manual_seed(step % 5)
    ids = torch.randint(256, (num_ranks, 2, 9), generator=generator).to(device)
    return ids[:, :, :-1], ids[:, :, 1:]


LEARNING_RATES = {"MemoryAdam": 2e-3, "MemoryAdagrad": 5e-3, "MemorySGD": 0.1, "AdamW": 2e-3}


def make_optimizer(run: Training, model: nn.Module) -> Any:
    groups = um.optim.param_groups(
        model,
        lr=LEARNING_RATES[run.optimizer],
        weight_decay=run.weight_decay,
        value_weight_decay=run.weight_decay,
    )
    home = um.optim if hasattr(um.optim, run.optimizer) else torch.optim
    return getattr(home, run.optimizer)(groups)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_alone(run: Training, num_ranks: int) -> Trained:
    """In one process, all ranks' batches at once."""
    model = language_model(run)
    optimizer = make_optimizer(run, model)
    losses, norms = [], []
    for step in range(run.steps):
        inputs, targets = (t.flatten(0, 1) for t in text(step, num_ranks, run.device))
        loss = cross_entropy(model(inputs)[0], targets)
        loss.backward()
        norms.append(um.optim.clip_grad_norm_(model, run.max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert model.table is not None
    return Trained(losses, norms, effective(model.table))


def effective(table: um.MemoryTable) -> dict[str, Tensor]:
    """Whole effective weights, on every rank."""
    rows = {}
    for name, parameter in table.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        scale = table.scale_of(parameter)
        rows[name] = (full.detach().double() * (1.0 if scale is None else scale)).cpu()
    return rows


def distribute(run: Training, model: ByteLM) -> nn.Module:
    """Over all ranks: the table by the package, the rest by DDP or FSDP2."""
    size = dist.get_world_size()
    shape = (run.copies, size // run.copies) if run.copies > 1 else (size,)
    assert model.table is not None
    if run.by == "copies":
        um.parallel.replicate_table(model.table, mesh_of(run.device, (size,)))
    else:
        um.parallel.shard_table(model.table, mesh_of(run.device, shape), by=run.by)
    if run.network == "ddp":
        um.parallel.ignore_tables_in_ddp(model)
        return DistributedDataParallel(model)
    mesh = init_device_mesh(run.device, (size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=um.parallel.table_parameters(model))


def train_distributed(run: Training) -> Trained:
    size, rank = dist.get_world_size(), dist.get_rank()
    model = language_model(run)
    wrapped = distribute(run, model)
    optimizer = make_optimizer(run, model)
    losses, norms = [], []
    for step in range(run.steps):
        inputs, targets = (t[rank] for t in text(step, size, run.device))
        loss = cross_entropy(wrapped(inputs)[0], targets)
        loss.backward()
        norms.append(um.optim.clip_grad_norm_(model, run.max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / size)
    assert model.table is not None
    return Trained(losses, norms, effective(model.table))


def train_from(run: Training, path: str, resume: bool, first: int, batches: int) -> list[float]:
    """Losses of some steps, from a checkpoint or to one, of the mean over so many batches that the
    ranks share; in one process without a process group, too."""
    size, rank = 1, 0
    if dist.is_initialized():
        size, rank = dist.get_world_size(), dist.get_rank()
    model = language_model(run)
    wrapped = distribute(run, model) if dist.is_initialized() else model
    optimizer = make_optimizer(run, model)
    if resume:
        torch.nn.init.zeros_(model.head.weight)  # what is loaded is what counts
        checkpoint = um.checkpoint.load(path, model, optimizer)
        assert checkpoint.step == first
    share = batches // size
    losses = []
    for step in range(first, first + run.steps):
        mine = slice(rank * share, (rank + 1) * share)
        inputs, targets = (t[mine].flatten(0, 1) for t in text(step, batches, run.device))
        loss = cross_entropy(wrapped(inputs)[0], targets)
        loss.backward()
        um.optim.clip_grad_norm_(model, run.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
        losses.append(mean.item() / size)
    if not resume:
        um.checkpoint.save(path, model, optimizer, step=first + run.steps)
    return losses


# ---- the wire ------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[float]]:
    """What this rank sends to others; an all-reduce is a reduce-scatter and an all-gather."""
    sent = [0.0]
    names = ("all_to_all_single", "all_gather_into_tensor", "all_reduce")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            size = dist.get_world_size(kwargs.get("group"))
            tensor = args[0] if name == "all_reduce" else args[1]
            nbytes = tensor.numel() * tensor.element_size()
            shares = {"all_to_all_single": 1 / size, "all_gather_into_tensor": 1.0}
            sent[0] += nbytes * (size - 1) * shares.get(name, 2 / size)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def sent_bytes(config: um.UltraMemConfig, by: str, tokens: int) -> tuple[float, float]:
    """Of a layer, forward and backward, for each token of this rank."""
    size = dist.get_world_size()
    table = um.MemoryTable.from_config(config, dtype=torch.bfloat16, grad_mode="deferred")
    layer = um.UltraMemLayer(config, 0, dtype=torch.bfloat16)
    um.parallel.shard_table(table, mesh_of("cpu", (size,)), by=by)
    x = torch.randn(tokens, config.d_model).bfloat16()
    with counted_bytes() as sent:
        out = layer(x, table)
        forward = sent[0]
        out.float().sum().backward()
        backward = sent[0] - forward
    return forward / tokens, backward / tokens
