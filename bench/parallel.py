"""``python -m bench.parallel``: tables sharded over the GPUs of this machine.

Sections:

    layer    a layer with every rank's batch on one table: sharded by columns and by rows over all
             GPUs, against the same layer and batch on one GPU; bytes on the wire
    block    a SwiGLU beside the sharded layer, one after the other and side by side
    large    a table that no GPU holds: drawn, forward and backward, a step of row-wise Adagrad
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ultramem_cuda as um
from ultramem_cuda.profiling.nvml import Unavailable, open_device
from ultramem_cuda.profiling.timing import capture, machine, write_json

from .shapes import SHAPES
from .value_ffn_layer import layer_config

SECTIONS = ("layer", "block", "large")
WAYS = ("one GPU", "columns", "rows")
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run measures; plain, for it goes to every rank."""

    sections: tuple[str, ...]
    shape: str
    num_tokens: int
    repeats: int
    large_parameters: int
    backend: str
    device_type: str


@dataclasses.dataclass
class Rank:
    """One process and its GPU."""

    settings: Settings
    mesh: DeviceMesh
    alone: DeviceMesh  # of this rank
    device: torch.device
    wire: Wire

    @property
    def size(self) -> int:
        return self.mesh.size()

    def times_ms(self, call: Callable[[], object], reset: Callable[[], object]) -> dict[str, float]:
        """Median and quartiles over runs of the slowest rank's time, all beginning together."""
        for _ in range(2):
            call()
            reset()
        samples = []
        for _ in range(self.settings.repeats):
            self.barrier()
            samples.append(self._clock(call))
            reset()
        slowest = torch.tensor(samples, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        q1, median, q3 = statistics.quantiles(slowest.tolist(), n=4)
        return {"median_ms": median, "q1_ms": q1, "q3_ms": q3}

    def _clock(self, call: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        call()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    def barrier(self) -> None:
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gibibytes(self) -> float:
        """The most that torch has allocated, of the rank that has most."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        most = torch.tensor([peak / GIB], device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most)


class Wire:
    """Bytes that this GPU has sent over NVLink, as the driver counts them."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = open_device(device) if device.type == "cuda" else Unavailable("no GPU")

    def sent(self, call: Callable[[], object], calls: int) -> float | str:
        """Bytes a call, or why they are not known."""
        before = self._count()
        for _ in range(calls):
            call()
        after = self._count()
        if isinstance(before, str) or isinstance(after, str):
            return after if isinstance(after, str) else str(before)
        return (after - before) / calls

    def _count(self) -> int | str:
        if isinstance(self._gpu, Unavailable):
            return self._gpu.reason
        torch.cuda.synchronize()
        time.sleep(0.2)  # the counter is behind
        sent = self._gpu.nvlink_sent_bytes()
        return sent.reason if isinstance(sent, Unavailable) else sent


# ---- layer ---------------------------------------------------------------------------------------


class Layer:
    """A layer with a table of one kind, and a rank's batch."""

    def __init__(self, rank: Rank, way: str, num_tokens: int) -> None:
        torch.manual_seed(dist.get_rank())
        self.config = layer_config(SHAPES[rank.settings.shape])
        self.num_tokens = num_tokens
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": rank.device}
        self.layer = um.UltraMemLayer(self.config, 0, **options)
        device = "meta" if way in ("columns", "rows") else rank.device
        self.table = um.MemoryTable.from_config(
            self.config, dtype=torch.bfloat16, device=device, grad_mode="deferred"
        )
        if way in ("columns", "rows"):
            um.parallel.shard_table(self.table, rank.mesh, by=way)
        else:
            # Optimizers step no table of which they know nothing where there are other ranks.
            um.parallel.replicate_table(self.table, rank.alone)
        self.table.reserve(num_tokens, dtype=torch.bfloat16)
        self.x = torch.randn(num_tokens, self.config.d_model, **options).requires_grad_()
        self.grad = torch.randn(num_tokens, self.config.d_model, **options)
        self.leaves = (self.x, *self.layer.parameters())
        self.optimizer = um.optim.MemoryAdagrad(self.table.parameters(), lr=1e-3)

    def forward(self) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.layer(self.x, self.table)
        return out

    def forward_backward(self) -> None:
        torch.autograd.grad(self.layer(self.x, self.table), self.leaves, self.grad)

    def clear(self) -> None:
        assert self.table.factors is not None
        self.table.factors.clear()


def measure_layer(rank: Rank) -> dict[str, Any]:
    """Times by way of sharding; "one GPU" is every GPU for itself, with a table of its own."""
    settings = rank.settings
    results: dict[str, Any] = {}
    for way, num_tokens in _layer_cases(rank):
        subject = Layer(rank, way, num_tokens)
        found: dict[str, Any] = {"tokens a rank": num_tokens}
        found["step, eager"] = rank.times_ms(lambda s=subject: _step(s), lambda: None)  # type: ignore[misc]
        found["optimizer step"] = _step_time(rank, subject)
        if way != "one GPU":
            found["wire"] = _wire(rank, subject, way)
        calls = {"fwd": subject.forward, "fwd+bwd": subject.forward_backward}
        for what, call in calls.items():
            found[f"{what}, eager"] = rank.times_ms(call, subject.clear)
        if rank.device.type == "cuda":
            for what, call in calls.items():
                graph = capture([call])
                found[f"{what}, graph"] = rank.times_ms(graph.replay, subject.clear)
        results[f"{way}, {num_tokens} tokens a rank"] = found
        say(f"layer {settings.shape}, {way}: {json.dumps(found)}")
        del subject
        release(rank)
    return results


def _layer_cases(rank: Rank) -> list[tuple[str, int]]:
    """The same batch on every rank, and the one GPU's batch over all of them."""
    tokens = rank.settings.num_tokens
    cases = [("one GPU", tokens), ("columns", tokens), ("rows", tokens)]
    return [*cases, ("columns", tokens // rank.size), ("rows", tokens // rank.size)]


def _step(subject: Layer) -> None:
    subject.forward_backward()
    subject.optimizer.step()
    subject.optimizer.zero_grad()


def _step_time(rank: Rank, subject: Layer) -> dict[str, float]:
    """The optimizer's step alone, factors in place."""
    subject.forward_backward()
    times = rank.times_ms(subject.optimizer.step, lambda: None)
    subject.optimizer.zero_grad()
    return times


def _wire(rank: Rank, subject: Layer, way: str) -> dict[str, Any]:
    """Bytes that a rank sends in a forward and backward: by formula, and what NVLink counted."""
    formula = um.parallel.wire_bytes(subject.config, way, rank.size)

    def call() -> None:
        subject.forward_backward()
        subject.clear()

    measured = rank.wire.sent(call, 20)
    return {"formula, bytes": formula.total * subject.num_tokens, "NVLink, bytes": measured}


# ---- block ---------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """The FFN of "1B-7B" beside a layer of shape M."""

    def __init__(self, d_model: int, inner: int, **options: Any) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 2 * inner, bias=False, **options)
        self.down = nn.Linear(inner, d_model, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def measure_block(rank: Rank) -> dict[str, Any]:
    """Forward and backward of FFN and sharded layer: one after the other, and side by side."""
    results: dict[str, Any] = {}
    for way in ("columns", "rows"):
        subject = Layer(rank, way, rank.settings.num_tokens)
        width = subject.config.d_model
        ffn = SwiGLU(width, 5632 * width // 2048, dtype=torch.bfloat16, device=rank.device)
        leaves = (*subject.leaves, *ffn.parameters())

        def alone(ffn: SwiGLU = ffn, s: Layer = subject) -> None:
            torch.autograd.grad(ffn(s.x), (s.x, *ffn.parameters()), s.grad)

        def in_turn(ffn: SwiGLU = ffn, s: Layer = subject, leaves: Any = leaves) -> None:
            torch.autograd.grad(ffn(s.x) + s.layer(s.x, s.table), leaves, s.grad)

        def beside(ffn: SwiGLU = ffn, s: Layer = subject, leaves: Any = leaves) -> None:
            out = um.ffn_with_memory(ffn, s.layer, s.x, s.table)
            torch.autograd.grad(out, leaves, s.grad)

        calls = {"FFN alone": alone, "in turn": in_turn, "side by side": beside}
        found: dict[str, Any] = {}
        for what, call in calls.items():
            found[f"{what}, eager"] = rank.times_ms(call, subject.clear)
        if rank.device.type == "cuda":
            for what, call in calls.items():
                found[f"{what}, graph"] = rank.times_ms(capture([call]).replay, subject.clear)
        results[way] = found
        say(f"block, {way}: {json.dumps(found)}")
        del subject, ffn, leaves, calls, alone, in_turn, beside
        release(rank)
    return results


# ---- large ---------------------------------------------------------------------------------------


def measure_large(rank: Rank) -> dict[str, Any]:
    """A table of so many parameters, by rows: drawn, read and stepped."""
    base = um.UltraMemConfig.preset("2.5B-120B")
    width = base.pre_value_dim + base.value_dim
    num_slots = -(-rank.settings.large_parameters // width)
    keys = min(base.num_keys, int(num_slots**0.5))
    config = um.UltraMemConfig.preset("2.5B-120B", num_slots=num_slots, num_keys=keys, num_layers=4)
    num_tokens = rank.settings.num_tokens // 4
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": rank.device}
    table = um.MemoryTable.from_config(
        config, dtype=torch.bfloat16, device="meta", grad_mode="deferred"
    )
    rank.barrier()
    begin = time.perf_counter()
    um.parallel.shard_table(table, rank.mesh, by="rows")
    rank.barrier()
    drawn = time.perf_counter() - begin
    layers = [um.UltraMemLayer(config, i, **options) for i in range(config.num_layers)]
    optimizer = um.optim.MemoryAdagrad(table.parameters(), lr=1e-2)
    table.reserve(config.num_layers * num_tokens, dtype=torch.bfloat16)
    x = torch.randn(num_tokens, config.d_model, **options)
    norms = []

    def forward_backward() -> None:
        out = x
        for layer in layers:
            out = out + layer(out, table)
        out.float().square().mean().backward()

    def step() -> None:
        forward_backward()
        norms.append(um.optim.clip_grad_norm_([], 1.0, tables=[table]))
        optimizer.step()
        optimizer.zero_grad()

    found = {
        "parameters": table.values.numel() + (0 if table.pre_values is None else num_slots * 320),
        "slots": num_slots,
        "layers": config.num_layers,
        "tokens a rank": num_tokens,
        "drawing, s": drawn,
        "forward and backward": rank.times_ms(forward_backward, optimizer.zero_grad),
        "forward, backward, clipping, step": rank.times_ms(step, lambda: None),
        "GiB a rank, peak": rank.gibibytes(),
        "norms of the gradient": [float(norm) for norm in norms[:3]],
    }
    say(f"large: {json.dumps(found)}")
    return found


# ---- running -------------------------------------------------------------------------------------


def release(rank: Rank) -> None:
    if rank.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


MEASURES = {"layer": measure_layer, "block": measure_block, "large": measure_large}


def _run(index: int, size: int, store: str, settings: Settings, path: str) -> None:
    if settings.device_type == "cuda":
        torch.cuda.set_device(index)
    dist.init_process_group(
        settings.backend, init_method=f"file://{store}", rank=index, world_size=size
    )
    mesh = init_device_mesh(settings.device_type, (size,), mesh_dim_names=("memory",))
    device = torch.device(f"cuda:{index}" if settings.device_type == "cuda" else "cpu")
    alone = init_device_mesh(settings.device_type, (size, 1), mesh_dim_names=("others", "alone"))
    rank = Rank(settings, mesh, alone["alone"], device, Wire(device))
    record: dict[str, Any] = {
        "machine": machine(device),
        "ranks": size,
        "settings": dataclasses.asdict(settings),
    }
    for section in settings.sections:
        record[section] = MEASURES[section](rank)
        if index == 0:
            write_json(Path(path), record)
        release(rank)
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=["layer", "block"])
    parser.add_argument("--shape", choices=SHAPES, default="M")
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank (default: 8192)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ranks", type=int, help="default: GPUs of this machine; on the CPU 2")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where it is")
    parser.add_argument(
        "--large-parameters", type=float, default=120e9, help="of section large (120e9)"
    )
    parser.add_argument("--json", type=Path, default=Path("ultramem-parallel.json"))
    arguments = parser.parse_args(argv)
    device_type = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = torch.cuda.device_count() if device_type == "cuda" else 2
    size = arguments.ranks or gpus
    if device_type == "cuda" and size > gpus:
        parser.error(f"--ranks: there are {gpus} GPUs, got {size}")
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    settings = Settings(
        tuple(arguments.section),
        arguments.shape,
        arguments.tokens,
        arguments.repeats,
        int(arguments.large_parameters),
        "nccl" if device_type == "cuda" else "gloo",
        device_type,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        mp.spawn(_run, (size, store, settings, str(arguments.json)), nprocs=size)
    print(f"record: {arguments.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
