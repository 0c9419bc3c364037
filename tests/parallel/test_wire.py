"""The formula for bytes on the wire is what goes over it."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from ranks import Ranks

import ultramem_cuda as um

TOKENS = 64
CONFIGS: dict[str, dict[str, Any]] = {
    "two cores": {},
    "one core": {"num_cores": 1},
    "values alone": {"pre_value_dim": 0},
    "groups apart": {"key_expand": 2, "sum_groups": False},
}


@pytest.mark.parametrize("by", ["columns", "rows"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_sent(pool: Any, size: int, name: str, by: str) -> None:
    ranks: Ranks = pool(size)
    config = cases.layer_config(**CONFIGS[name])
    expected = um.parallel.wire_bytes(config, by, size)
    for forward, backward in ranks.run(cases.sent_bytes, config, by, TOKENS):
        assert forward == pytest.approx(expected.forward)
        assert backward == pytest.approx(expected.backward)
    assert expected.total == expected.forward + expected.backward


def test_nothing_is_sent_by_one_rank() -> None:
    assert um.parallel.wire_bytes(cases.layer_config(), "columns", 1).total == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="by: must be 'columns' or 'rows', got 'both'"):
        um.parallel.wire_bytes(cases.layer_config(), "both", 2)
    with pytest.raises(ValueError, match="num_ranks: must be at least 1, got 0"):
        um.parallel.wire_bytes(cases.layer_config(), "rows", 0)
