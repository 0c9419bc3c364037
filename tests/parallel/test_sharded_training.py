"""Fifty steps of the example's language model over several ranks are those of one process."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from ranks import Ranks

RUNS: dict[str, dict[str, Any]] = {
    "columns, DDP": {"by": "columns"},
    "columns, FSDP2": {"by": "columns", "network": "fsdp"},
    "rows, DDP": {"by": "rows"},
    "rows, FSDP2": {"by": "rows", "network": "fsdp"},
}
FURTHER: dict[str, dict[str, Any]] = {
    "columns, Adagrad": {"by": "columns", "optimizer": "MemoryAdagrad"},
    "rows, Adagrad, FSDP2": {"by": "rows", "optimizer": "MemoryAdagrad", "network": "fsdp"},
    "columns, SGD": {"by": "columns", "optimizer": "MemorySGD"},
    "dense columns": {"by": "columns", "grad_mode": "dense"},
    "dense columns, Adagrad": {
        "by": "columns",
        "grad_mode": "dense",
        "optimizer": "MemoryAdagrad",
    },
    "dense rows, FSDP2": {"by": "rows", "grad_mode": "dense", "network": "fsdp"},
    "dense rows, torch's AdamW": {"by": "rows", "grad_mode": "dense", "optimizer": "AdamW"},
    "copies": {"by": "copies"},
    "no pre-values": {"by": "columns", "pre_value_dim": 0},
}


def check(ranks: Ranks, run: cases.Training, bound: float) -> None:
    expected = cases.train_alone(run, ranks.size)
    # There is something to find out: it learns, batch by batch of five, and clipping has work.
    assert sum(expected.losses[-5:]) < sum(expected.losses[:5]) - 0.5
    assert max(expected.norms) > run.max_norm
    results = ranks.run(cases.train_distributed, run)
    for actual in results:
        assert actual.losses == pytest.approx(expected.losses, rel=0, abs=bound)
        assert actual.norms == pytest.approx(expected.norms, rel=bound)
        for name, rows in expected.table.items():
            torch.testing.assert_close(actual.table[name], rows, rtol=0, atol=bound)
    for name in expected.table:
        assert all(torch.equal(results[0].table[name], r.table[name]) for r in results)


def training(ranks: Ranks, fields: dict[str, Any]) -> tuple[cases.Training, float]:
    """float64, in which no top-k flips, and a bound; on GPUs float32."""
    if ranks.device_type == "cpu":
        return cases.Training(**fields), 1e-9
    # Whose rounding Adam would turn into whole steps where gradients are near zero.
    sgd = {**fields, "optimizer": "MemorySGD"}
    return cases.Training(**sgd, dtype=torch.float32, device="cuda", steps=15), 1e-3


@pytest.mark.parametrize("name", RUNS)
def test_fifty_steps(ranks: Ranks, name: str) -> None:
    check(ranks, *training(ranks, RUNS[name]))


@pytest.mark.parametrize("name", FURTHER)
def test_other_optimizers_and_gradients(pool: Any, name: str) -> None:
    ranks = pool(2)
    check(ranks, cases.Training(**FURTHER[name], steps=15), 1e-9)


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_memory_groups_beside_copies(pool: Any, by: str) -> None:
    check(pool(4), cases.Training(by=by, copies=2, steps=15), 1e-9)
