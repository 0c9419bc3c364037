"""Processes that wait for work: starting them, and importing torch in each, is what takes time."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 300.0


def _serve(rank: int, size: int, backend: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    while (work := _next(pipe)) is not None:
        function, args = work
        try:
            torch.manual_seed(0)
            pipe.send((None, function(*args)))
        except BaseException:  # a failed pytest.raises is no Exception
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()


def _next(pipe: Connection) -> Any:
    """None where there is no more work, or nobody to give it."""
    try:
        return pipe.recv()
    except EOFError:
        return None


class Ranks:
    """A process group of so many ranks on this machine.

    Args:
        size: ranks.
        backend: "gloo", on CPUs; "nccl", a GPU each.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size = size
        self.device_type = "cuda" if backend == "nccl" else "cpu"
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, backend, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returns on every rank; it raises where it did on one of them."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, tuple[str | None, Any]] = {}
        while len(answers) < self.size:
            open_pipes = [p for rank, p in enumerate(self._pipes) if rank not in answers]
            ready = wait(open_pipes, TIMEOUT_S)
            failed = [trace for trace, _ in answers.values() if trace is not None]
            if not ready:
                self.stop()
                raise AssertionError("\n".join(["ranks do not answer", *failed]))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                answers[rank] = pipe.recv()
                if answers[rank][0] is not None:
                    # The others may wait for this one in a collective.
                    self._collect_briefly(answers)
                    break
            failed = [trace for trace, _ in answers.values() if trace is not None]
            if failed and len(answers) < self.size:
                self.stop()
                raise AssertionError("\n".join(failed))
        failed = [trace for trace, _ in answers.values() if trace is not None]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answers[rank][1] for rank in range(self.size)]

    def _collect_briefly(self, answers: dict[int, tuple[str | None, Any]]) -> None:
        for rank, pipe in enumerate(self._pipes):
            if rank not in answers and pipe.poll(5.0):
                answers[rank] = pipe.recv()

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def close(self) -> None:
        for pipe in self._pipes if self.alive else []:
            pipe.send(None)
        for process in self._processes:
            process.join(10.0)
        self.stop()
        self._folder.cleanup()
