"""``python -m bench.value_ffn``: the value FFN, deferred gradients and optimizers against their
targets and floors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import value_ffn_cases as cases
from .command import Bench, Section, bench_main
from .value_ffn_large import large_rows, large_shape
from .value_ffn_layer import layer_measures

BENCH = Bench(
    "value_ffn",
    "Times value_ffn, optimizers and layers on a GPU, bfloat16, cold caches.",
    {
        "table": Section("value_ffn forward, backward dense and deferred", cases.table_rows, "SBM"),
        "step": Section("optimizer steps after all layers' backwards", cases.step_rows, "SM"),
        "training": Section("value_ffn and step, a layer's share", cases.training_rows, "SM"),
        "layer": Section("UltraMemLayer, deferred table, CUDA graph", layer_measures, "SBM"),
        "state": Section("bytes of weights and optimizer states", cases.state_quantities, "SM"),
        "large": Section("a table of 20e9 elements", large_rows, own=(large_shape(),)),
    },
    repeats=20,
    shape_help="step, training and state have no B; large has a shape of its own",
    notes={"step_floor": cases.STEP_FLOOR},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    return bench_main(BENCH, argv)


if __name__ == "__main__":
    sys.exit(main())
