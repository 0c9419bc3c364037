"""The demo's training: every kind of block at one size, and what its sparse layers touch.

On a CPU the kinds are trained side by side, in processes of their own. Models this small have too
little work in one operation to share among threads, and threads that meet after every operation
lose a time slice at each meeting when the machine has other things to do.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..examples.lm.config import KINDS, Kind, ModelConfig
from ..examples.lm.data import Corpus
from ..examples.lm.errors import UsageError
from ..examples.lm.matching import matched
from ..examples.lm.memory import memory_config
from ..examples.lm.presets import PRESETS, Preset
from ..examples.lm.train import RunResult, Trainer
from ..examples.lm.usage import mean_distinct, sparse_choices
from ..profiling import traffic
from .doctor import usable_cores
from .interrupts import terminable
from .report import CountedTraffic

# How long a process may take to clean up before it is killed.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Trained:
    """A finished run and the traffic of its sparse layers (None for dense)."""

    result: RunResult
    traffic: CountedTraffic | None


@dataclass(frozen=True)
class _Job:
    """One kind's training, as it is handed to a process."""

    kind: Kind
    preset: Preset
    corpus: Corpus
    out: Path
    device: torch.device
    quiet: bool
    progress_bar: bool


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


def resolve_jobs(asked: int | None, device: torch.device) -> int:
    """Kinds trained at once: as many as there are cores for them, one on a GPU."""
    if asked is not None and asked < 1:
        raise UsageError("--jobs", f"must be positive, got {asked}")
    if device.type == "cuda":
        return 1
    return min(asked or usable_cores(), len(KINDS))


def threads_per_job(jobs: int) -> int:
    """Threads that each of ``jobs`` processes computes with."""
    return max(1, torch.get_num_threads() // jobs)


def train_kinds(
    preset: Preset, corpus: Corpus, out: Path, device: torch.device, *, quiet: bool, jobs: int
) -> list[Trained]:
    """Trains every kind, ``jobs`` at a time, each in a folder below ``out``; in KINDS' order."""
    tasks = [
        _Job(kind, preset, corpus, out / kind, device, quiet, progress_bar=jobs == 1)
        for kind in KINDS
    ]
    if jobs == 1:
        return [_train(task) for task in tasks]
    # A forked child would inherit thread pools without their threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        jobs, context, initializer=_start_process, initargs=(threads_per_job(jobs),)
    ) as pool:
        try:
            with _interrupts_blocked():
                # The last kinds take longest and go first.
                futures = [pool.submit(_train_in_process, task) for task in reversed(tasks)]
            return _results(futures)[::-1]
        except BrokenProcessPool as error:
            message = "a training process was killed (no memory left?); try --jobs 1"
            raise UsageError("--jobs", message) from error
        except BaseException:
            # Interrupted, or one kind failed: the pool would first train the others to their end.
            _stop_processes()
            raise


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C: this one does, and stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _results(futures: Sequence[Future[Trained]]) -> list[Trained]:
    """Waits for all, or for the first that fails, whose error it raises."""
    finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in finished:
        future.result()
    return [future.result() for future in futures]


def _stop_processes() -> None:
    processes = multiprocessing.active_children()
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()


def _start_process(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, even one that had no time to say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _train_in_process(job: _Job) -> Trained:
    try:
        with terminable():
            return _train(job)
    except KeyboardInterrupt:
        # Half-written files are removed by now. The parent, if there still is one, reports it.
        os._exit(1)


def _train(job: _Job) -> Trained:
    trainer = Trainer(
        matched(dataclasses.replace(job.preset.model, kind=job.kind)),
        job.preset.train,
        job.corpus,
        out=job.out,
        device=job.device,
        quiet=job.quiet,
        progress_bar=job.progress_bar,
    )
    result = trainer.run()
    return Trained(result, count_traffic(trainer, result))


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
            layer.traffic("decode", batch, touched=distinct) + beside.traffic("decode", batch)
            for batch, distinct in zip(batches, touched, strict=True)
        ]
        return [read.parameters.lower / batch for read, batch in zip(reads, batches, strict=True)]

    return CountedTraffic(
        kind=config.kind,
        batches=batches,
        expected_share=[touched / layer.population for touched in expected],
        counted_share=[touched / layer.population for touched in counted],
        expected_bytes=bytes_per_token(expected),
        counted_bytes=bytes_per_token(counted),
    )


def sparse_layer(config: ModelConfig) -> traffic.SparseLayer:
    """The traffic model of one sparse layer of a trained configuration."""
    if config.kind == "moe":
        return traffic.MoEFFN(
            config.d_model, config.expert_inner, config.num_experts, config.experts_per_token
        )
    kind = traffic.PKMLayer if config.kind == "pkm" else traffic.MemoryLayer
    return kind(memory_config(config))
