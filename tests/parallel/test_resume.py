"""A run saved by four ranks goes on with two, and with one, as it would have with four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest

BATCHES = 4


def test_another_number_of_ranks(pool: Any, tmp_path: Path) -> None:
    """By columns beside DDP, then by rows beside FSDP2."""
    run = cases.Training(by="columns", network="ddp", steps=10)
    twenty = cases.train_alone(cases.Training(steps=20), BATCHES).losses
    path = str(tmp_path / "checkpoint")
    for losses in pool(4).run(cases.train_from, run, path, False, 0, BATCHES):
        assert losses == pytest.approx(twenty[:10], rel=0, abs=1e-9)
    then = cases.Training(by="rows", network="fsdp", steps=10)
    for losses in pool(2).run(cases.train_from, then, path, True, 10, BATCHES):
        assert losses == pytest.approx(twenty[10:], rel=0, abs=1e-9)
    for losses in pool(4).run(cases.train_from, run, path, True, 10, BATCHES):
        assert losses == pytest.approx(twenty[10:], rel=0, abs=1e-9)
    losses = cases.train_from(then, path, True, 10, BATCHES)
    assert losses == pytest.approx(twenty[10:], rel=0, abs=1e-9)
