"""A run saved by four ranks goes on with two, and with one, as it would have with four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest

BATCHES = 4


@pytest.mark.parametrize(
    ("by", "network", "then_by", "then_network"),
    [("columns", "ddp", "rows", "fsdp"), ("rows", "fsdp", "columns", "ddp")],
)
def test_another_number_of_ranks(
    pool: Any, tmp_path: Path, by: str, network: str, then_by: str, then_network: str
) -> None:
    run = cases.Training(by=by, network=network, steps=10)
    twenty = cases.train_alone(cases.Training(steps=20), BATCHES).losses
    path = str(tmp_path / "checkpoint")
    for losses in pool(4).run(cases.train_from, run, path, False, 0, BATCHES):
        assert losses == pytest.approx(twenty[:10], rel=0, abs=1e-9)
    then = cases.Training(by=then_by, network=then_network, steps=10)
    for losses in pool(2).run(cases.train_from, then, path, True, 10, BATCHES):
        assert losses == pytest.approx(twenty[10:], rel=0, abs=1e-9)
    for losses in pool(4).run(cases.train_from, run, path, True, 10, BATCHES):
        assert losses == pytest.approx(twenty[10:], rel=0, abs=1e-9)
    losses = cases.train_from(then, path, True, 10, BATCHES)
    assert losses == pytest.approx(twenty[10:], rel=0, abs=1e-9)
