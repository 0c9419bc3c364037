"""Windows of layers on the shared table."""

from __future__ import annotations

import pytest

import ultramem_cuda as um
from ultramem_cuda import topology


def windows(kind: str, num_layers: int, num_slots: int, window: int) -> list[tuple[int, int]]:
    return [
        topology.layer_window(
            kind, layer, num_layers=num_layers, num_slots=num_slots, window=window
        )
        for layer in range(num_layers)
    ]


def test_ring_follows_the_release() -> None:
    # The release: offset = layer * knum^2, window = n*n, modulo N, here with knum 360 and n 1138.
    config = um.UltraMemConfig.preset("227M-1.2B")
    for layer in range(config.num_layers):
        assert config.layer_window(layer) == (1138**2, layer * 360**2)


def test_ring_covers_the_table_evenly() -> None:
    reads = [0] * 40
    for window, offset in windows("ring", 4, 40, 20):
        for row in range(window):
            reads[(row + offset) % 40] += 1
    assert reads == [2] * 40


def test_noring_is_clamped_at_the_end() -> None:
    assert windows("noring", 4, 40, 20) == [(20, 0), (20, 10), (20, 20), (20, 20)]


def test_block_layers_share_whole_blocks() -> None:
    assert windows("block", 6, 41, 20) == [(20, 0)] * 3 + [(20, 20)] * 3
    assert windows("block", 2, 90, 20) == [(20, 0), (20, 20)]


def test_private_windows_do_not_overlap() -> None:
    rows = [
        offset + row for window, offset in windows("private", 4, 43, 10) for row in range(window)
    ]
    assert len(set(rows)) == 40
    assert max(rows) < 43


def test_expansion_divides_the_window() -> None:
    config = um.UltraMemConfig.preset("227M-1.2B", num_keys=1138, key_expand=2)
    assert config.layer_window(1) == (1138**2 // 4, 360**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("star", 0, 4, 40, 20), r"topology: must be one of"),
        (("ring", 4, 4, 40, 20), r"layer_index: must be in \[0, 4\), got 4"),
        (("ring", -1, 4, 40, 20), r"layer_index: must be in \[0, 4\), got -1"),
        (("ring", 0, 4, 40, 41), r"num_slots: must be at least .* 41 rows .*got 40"),
        (("private", 0, 4, 40, 11), r"num_slots: with private windows .* = 44, got 40"),
    ],
)
def test_misfits_are_refused(arguments: tuple[str, int, int, int, int], message: str) -> None:
    kind, layer, num_layers, num_slots, window = arguments
    with pytest.raises(ValueError, match=message):
        topology.layer_window(
            kind, layer, num_layers=num_layers, num_slots=num_slots, window=window
        )


def test_shared_num_keys() -> None:
    assert topology.shared_num_keys(360, 20, 0.5) == 1138
    assert topology.shared_num_keys(528, 16, 0.25) == 1056
    assert topology.shared_num_keys(10, 1, 1.0) == 10
    for arguments, name in (
        ((0, 1, 1.0), "keys_per_layer"),
        ((1, 0, 1.0), "num_layers"),
        ((1, 1, 0.0), "share_ratio"),
        ((1, 1, 1.1), "share_ratio"),
    ):
        with pytest.raises(ValueError, match=f"{name}: must be"):
            topology.shared_num_keys(*arguments)
