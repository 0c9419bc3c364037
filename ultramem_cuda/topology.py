"""Which rows of the shared value table a layer sees (UltraMemV2, section 4.2.8).

A layer addresses ``window`` consecutive rows that start at ``offset`` and wrap around the table of
``num_slots`` rows. The four topologies differ only in these two numbers:

========  ==========================================================================================
ring      layer l starts at row l * (num_slots // num_layers); the last layers wrap around
noring    the same, but clamped so that no window wraps: the last layers share the table's end
block     the table is cut into num_slots // window blocks, each shared by neighbouring layers
private   layer l owns rows of its own: the ring's offsets with windows that do not overlap
========  ==========================================================================================
"""

from __future__ import annotations

import math
from typing import Literal, get_args

Topology = Literal["ring", "noring", "block", "private"]

TOPOLOGIES: tuple[str, ...] = get_args(Topology)


def shared_num_keys(keys_per_layer: int, num_layers: int, share_ratio: float) -> int:
    """Keys per side of a layer whose window covers a share of all layers' rows.

    With ``keys_per_layer`` k, each of L layers brings k*k rows to one table; a layer sees the
    fraction ``share_ratio`` of the L*k*k rows, so n = floor(sqrt(L * k^2 * share_ratio)): 360 keys,
    20 layers and ratio 0.5 give 1138 (UltraMemV2, table 10).

    Raises:
        ValueError: ``share_ratio`` is not in (0, 1], or another argument is not positive.
    """
    if keys_per_layer < 1:
        raise ValueError(f"keys_per_layer: must be at least 1, got {keys_per_layer}")
    if num_layers < 1:
        raise ValueError(f"num_layers: must be at least 1, got {num_layers}")
    if not 0.0 < share_ratio <= 1.0:
        raise ValueError(f"share_ratio: must be in (0, 1], got {share_ratio}")
    return math.isqrt(int(num_layers * keys_per_layer**2 * share_ratio))


def check_window(topology: str, num_layers: int, num_slots: int, window: int) -> None:
    """Raise ValueError where ``window`` rows a layer do not fit the table under ``topology``."""
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology: must be one of {', '.join(TOPOLOGIES)}, got {topology!r}")
    if not 0 < window <= num_slots:
        raise ValueError(
            f"num_slots: must be at least the window of a layer, {window} rows "
            f"(num_keys^2 / key_expand^2), got {num_slots}"
        )
    if topology == "private" and window > num_slots // num_layers:
        raise ValueError(
            f"num_slots: with private windows it must be at least num_layers * window = "
            f"{num_layers} * {window} = {num_layers * window}, got {num_slots}"
        )


def layer_window(
    topology: str, layer_index: int, *, num_layers: int, num_slots: int, window: int
) -> tuple[int, int]:
    """The ``(window, offset)`` of one layer, in rows of the table.

    Raises:
        ValueError: unknown topology, layer out of range, or a window that does not fit.
    """
    check_window(topology, num_layers, num_slots, window)
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index: must be in [0, {num_layers}), got {layer_index}")
    if topology == "block":
        num_blocks = min(num_slots // window, num_layers)
        return window, layer_index * num_blocks // num_layers * window
    # The release steps by the square of the keys a layer has before sharing, which is the table's
    # equal share of one layer.
    offset = layer_index * (num_slots // num_layers)
    if topology == "noring":
        offset = min(offset, num_slots - window)
    return window, offset
