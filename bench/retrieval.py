"""``python -m bench.retrieval``: retrieval against its targets, its peers and itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import retrieval_cases as cases
from .command import Bench, Section, bench_main
from .shapes import SHAPES

BENCH = Bench(
    "retrieval",
    "Times tucker_query and product_key_topk on a GPU, bfloat16, cold caches.",
    {
        "table": Section(
            "product_key_topk against torch eager and torch.compile, T = 8192",
            cases.table_rows,
            "SBML",
        ),
        "query": Section(
            "tucker_query forward + backward against F.linear + compiled rms_norm",
            cases.query_rows,
            "SBM",
        ),
        "decode": Section(
            "tucker_query + product_key_topk forward at small T, as CUDA graphs",
            cases.decode_rows,
            "SBM",
        ),
        "memory": Section(
            "peak extra memory of product_key_topk forward + backward at shape S",
            cases.memory_use,
            own=(SHAPES["S"],),
        ),
        "sweep": Section(
            "time of product_key_topk against n, m, T and Kd",
            cases.sweep_rows,
            own=(SHAPES["S"],),
        ),
        "adversarial": Section(
            "the forward under sorted, equal and repeated scores",
            cases.adversarial_rows,
            own=(SHAPES["S"], SHAPES["B"], SHAPES["M"]),
        ),
    },
    repeats=25,
    shape_help="shapes of the sections table, query and decode (the last two have no L)",
    compiles=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    return bench_main(BENCH, argv)


if __name__ == "__main__":
    sys.exit(main())
