"""``ultramem demo``: the whole way from the build to a trained memory layer, and a report of it."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import _library
from ..examples.lm.arguments import describe_corpus, resolve_device, results_table
from ..examples.lm.config import KINDS, ModelConfig
from ..examples.lm.data import load_corpus
from ..examples.lm.errors import UsageError
from ..examples.lm.files import write_atomically
from ..examples.lm.matching import matched
from ..examples.lm.presets import PRESETS, Preset
from ..examples.lm.train import RunResult, Trainer
from ..examples.lm.usage import mean_distinct, sparse_choices
from ..profiling import traffic
from . import check, doctor, report
from .report import CountedTraffic, ReportData

REPORT_NAME = "report.html"


def run(args: argparse.Namespace) -> int:
    """Runs everything; 0 if the library loads and the check passes, else 1."""
    started = time.perf_counter()
    device = resolve_device(args.device)
    facts = doctor.sections()
    print(doctor.render(facts), flush=True)
    if not _library.is_loaded():
        print("ultramem demo: the native library is not loaded; see above", file=sys.stderr)
        return 1
    out: Path = args.out
    _make_directory(out)
    corpus = load_corpus(args.data, args.pattern)

    _heading("Operators and gradients against the float64 reference")
    comparisons = check.compare(check.devices(args.device))
    failed = [row for row in comparisons if not row.ok]
    print(check.render(failed) if failed else check.summary(comparisons), flush=True)

    _heading("Training")
    print(describe_corpus(corpus), flush=True)
    preset = demo_preset(device, args.seed, args.steps)
    trainers, results = [], []
    for kind in KINDS:
        config = matched(dataclasses.replace(preset.model, kind=kind))
        trainer = Trainer(
            config,
            preset.train,
            corpus,
            out=out / "runs" / kind,
            device=device,
            quiet=args.quiet,
        )
        results.append(trainer.run())
        trainers.append(trainer)
    print(results_table(results))
    print(report.verdict(results), flush=True)

    _heading("Memory traffic, MB a token in one layer, forward, by tokens in the batch")
    counted = [
        row
        for trainer, result in zip(trainers, results, strict=True)
        if (row := count_traffic(trainer, result)) is not None
    ]
    print(report.traffic_text(counted))

    data = ReportData(
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        device=doctor.gpu_name(device.index or 0) if device.type == "cuda" else _cpu_description(),
        facts=facts,
        comparisons=comparisons,
        corpus=corpus,
        results=results,
        counted=counted,
        seconds=time.perf_counter() - started,
    )
    path = out / REPORT_NAME
    page = report.render(data).encode()
    try:
        write_atomically(path, lambda file: file.write(page))
    except OSError as error:
        raise UsageError("--out", f"cannot write '{path}': {error.strerror}") from error
    print(f"\nreport: {path.resolve()}  ({data.seconds:.0f} s)")
    return 1 if failed else 0


def demo_preset(device: torch.device, seed: int, steps: int | None) -> Preset:
    """What the demo trains on this device: sized for two CPU cores, or for two minutes of GPU."""
    name = "brief" if device.type == "cuda" else "tiny"
    preset = PRESETS[name]
    train = dataclasses.replace(preset.train, seed=seed)
    if device.type == "cuda":
        train = dataclasses.replace(train, precision="bf16")
    if steps is not None:
        if steps < 1:
            raise UsageError("--steps", f"must be positive, got {steps}")
        train = dataclasses.replace(train, steps=steps)
    return Preset(preset.model, train)


def count_traffic(trainer: Trainer, result: RunResult) -> CountedTraffic | None:
    """What the trained model's sparse layers really touch on held-out text; None for dense."""
    config = result.model_config
    size = trainer.config.batch // trainer.config.accumulate
    choices = sparse_choices(trainer.model, trainer.val_inputs, size)
    if not choices:
        return None
    layer = sparse_layer(config)
    beside = traffic.DenseFFN(config.d_model, 0 if config.kind == "moe" else config.ffn_inner)
    batches = [batch for batch in traffic.BATCH_SIZES if batch <= len(choices[0])]
    counted = [mean_distinct(choices, batch) for batch in batches]
    expected = [layer.touched(batch) for batch in batches]

    def bytes_per_token(touched: Sequence[float]) -> list[float]:
        reads = [
            layer.with_touched(batch, distinct) + beside.forward(batch)
            for batch, distinct in zip(batches, touched, strict=True)
        ]
        return [read.lower / batch for read, batch in zip(reads, batches, strict=True)]

    return CountedTraffic(
        kind=config.kind,
        batches=batches,
        expected_share=[touched / layer.population for touched in expected],
        counted_share=[touched / layer.population for touched in counted],
        expected_bytes=bytes_per_token(expected),
        counted_bytes=bytes_per_token(counted),
    )


def sparse_layer(config: ModelConfig) -> traffic.MoEFFN | traffic.MemoryLayer:
    """The traffic model of one sparse layer of a trained configuration."""
    if config.kind == "moe":
        return traffic.MoEFFN(
            config.d_model, config.expert_inner, config.num_experts, config.experts_per_token
        )
    tucker = config.kind == "ultramem_v2"
    return traffic.MemoryLayer(
        d_model=config.d_model,
        num_keys=config.num_keys,
        key_dim=config.key_dim,
        topk=config.topk,
        value_dim=config.value_dim,
        window=config.num_keys**2,
        pre_value_dim=config.pre_value_dim if tucker else 0,
        num_heads=config.memory_heads,
        tucker_rank=2 if tucker else 1,
        num_cores=2 if tucker else 0,
    )


def _heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def _cpu_description() -> str:
    count = torch.get_num_threads()
    return f"{doctor.processor_name()}, {count} thread{'' if count == 1 else 's'}"


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("--out", f"cannot create '{path}': {error.strerror}") from error
