"""Process groups, each started once for all tests that want one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


class Pool:
    """Groups by size and backend; one that a failure has broken is started anew."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, str], Ranks] = {}

    def __call__(self, size: int, backend: str = "gloo") -> Ranks:
        key = (size, backend)
        if key in self._groups and not self._groups[key].alive:
            self._groups.pop(key).close()
        if key not in self._groups:
            self._groups[key] = Ranks(size, backend)
        return self._groups[key]

    def close(self) -> None:
        for group in self._groups.values():
            group.close()


# Of this folder: tests elsewhere look at what processes there are.
@pytest.fixture(scope="package")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(
    params=[
        pytest.param((2, "gloo"), id="2-gloo"),
        pytest.param((4, "gloo"), id="4-gloo"),
        pytest.param((1, "nccl"), id="1-nccl", marks=pytest.mark.gpu),
        pytest.param((2, "nccl"), id="2-nccl", marks=pytest.mark.gpu),
    ]
)
def ranks(request: pytest.FixtureRequest, pool: Pool) -> Ranks:
    """Two and four processes on the CPU; one and two on GPUs."""
    size, backend = request.param
    if backend == "nccl" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, there are {torch.cuda.device_count()}")
    return pool(size, backend)
