"""Checkpoints of several processes; distributed_worker.py says what is checked in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
from small_model import same_tensors, train

import ultramem_cuda as um

FILE = Path(worker.__file__)
ROOT = FILE.parents[2]
TIMEOUT_S = 300


def test_four_processes(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FILE.parent}"}
    environment["OMP_NUM_THREADS"] = "1"
    # What is freed goes back at once, so that a peak is what was held and no slack of malloc.
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    logs = [tmp_path / f"log-{rank}" for rank in range(worker.WORLD_SIZE)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                command = [sys.executable, str(FILE), str(rank), str(tmp_path)]
                processes.append(
                    subprocess.Popen(
                        command, env=environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [-signal.SIGKILL, 0, 0, 0], said
    assert said.count("done\n") == worker.WORLD_SIZE - 1, said

    # The killed save has left no checkpoint, and those before it are as they were.
    assert not (tmp_path / "killed").exists()
    assert any((tmp_path / ".killed.incomplete").iterdir())
    latest = um.checkpoint.latest(tmp_path)
    assert latest == tmp_path / "large-1"
    model, optimizer = worker.make(7)
    um.checkpoint.load(tmp_path / "columns", model, optimizer)
    expected, expected_optimizer = worker.make(0)
    train(expected, [expected_optimizer])
    worker.check_equal(model, optimizer, expected, expected_optimizer)

    # What is left of it does not disturb the next save, which is whole again.
    um.checkpoint.save(tmp_path / "killed", model, optimizer, step=10)
    assert um.checkpoint.latest(tmp_path) == tmp_path / "killed"
    assert not (tmp_path / ".killed.incomplete").exists()
    other, _ = worker.make(8)
    assert um.checkpoint.load(tmp_path / "killed", other).step == 10
    assert same_tensors(other.state_dict(), expected.state_dict())
