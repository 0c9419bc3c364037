"""``python -m bench.retrieval``: retrieval against its targets, its peers and itself."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ops as bench_ops
from . import retrieval_cases as cases
from .report import Row, table, verdict
from .shapes import SHAPES, SMOKE
from .timing import machine, write_json

SECTIONS = {
    "table": "product_key_topk against torch eager and torch.compile, T = 8192",
    "query": "tucker_query forward + backward against F.linear + compiled rms_norm",
    "decode": "tucker_query + product_key_topk forward at small T, as CUDA graphs",
    "memory": "peak extra memory of product_key_topk forward + backward at shape S",
    "sweep": "time of product_key_topk against n, m, T and Kd",
    "adversarial": "the forward under sorted, equal and repeated scores",
}
# Shapes that a section takes, where it takes any.
_SECTION_SHAPES = {"table": "SBML", "query": "SBM", "decode": "SBM"}


def measure_section(name: str, settings: cases.Settings, wrong: list[str]) -> Iterator[Row]:
    """The rows of a section that has rows (all but "memory")."""
    if name == "table":
        return cases.table_rows(settings, wrong)
    functions: dict[str, Callable[[cases.Settings], Iterator[Row]]] = {
        "query": cases.query_rows,
        "decode": cases.decode_rows,
        "sweep": cases.sweep_rows,
        "adversarial": cases.adversarial_rows,
    }
    return functions[name](settings)


def run(arguments: argparse.Namespace, where: dict[str, Any]) -> list[str]:
    """Measures and prints section by section; returns what was wrong.

    The record is written after each: a section that breaks down takes no other with it.
    """
    wrong: list[str] = []
    records: dict[str, Any] = {}
    record = {
        "machine": where,
        "dtype": "bfloat16",
        "repeats": arguments.repeats,
        "smoke": arguments.smoke,
        "shapes": [dataclasses.asdict(SHAPES[name]) for name in "SBML"],
        "sections": records,
        "wrong": wrong,
    }
    for name in arguments.sections:
        print(f"\n{name}: {SECTIONS[name]}\n", flush=True)
        settings = settings_for(arguments, name)
        if name == "memory":
            memory = cases.memory_use(settings)
            print(describe_memory(memory), flush=True)
            records[name] = memory_record(memory)
        else:
            rows = list(measure_section(name, settings, wrong))
            print(table(rows), flush=True)
            records[name] = [row.record() for row in rows]
        if arguments.json is not None:
            write_json(arguments.json, record)
        torch.cuda.empty_cache()
    return wrong


def settings_for(arguments: argparse.Namespace, section: str) -> cases.Settings:
    names = [name for name in arguments.shape if name in _SECTION_SHAPES.get(section, "")]
    shapes = (SMOKE,) if arguments.smoke else tuple(SHAPES[name] for name in names)
    return cases.Settings(
        torch.device("cuda"),
        shapes,
        arguments.repeats,
        arguments.warmup,
        arguments.compile,
        arguments.seed,
        arguments.smoke,
    )


def describe_memory(memory: cases.MemoryUse) -> str:
    text = (
        f"shape {memory.shape}: forward {memory.forward / 1e6:.1f} MB, "
        f"backward {memory.backward / 1e6:.1f} MB"
    )
    reached = memory.reached()
    if memory.target is None or reached is None:
        return text
    return f"{text}; peak {memory.peak / 1e6:.1f} MB <= {memory.target / 1e6:g}: {verdict(reached)}"


def memory_record(memory: cases.MemoryUse) -> dict[str, Any]:
    reached = memory.reached()
    return {
        **{f"{name}_bytes": getattr(memory, name) for name in ("forward", "backward", "peak")},
        "shape": memory.shape,
        "target_bytes": memory.target,
        "verdict": None if reached is None else verdict(reached),
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.retrieval",
        description="Times tucker_query and product_key_topk on a GPU, bfloat16, cold caches.",
        epilog="; ".join(f"{name}: {what}" for name, what in SECTIONS.items()),
    )
    parser.add_argument("--section", nargs="+", choices=SECTIONS, help="default: all")
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=list("SBML"),
        default=list("SBML"),
        help="shapes of the sections table, query and decode (the last two have no L)",
    )
    parser.add_argument("--repeats", type=int, default=25, help="timed runs of each (default 25)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed runs of each (default 3)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-compile: no peer under torch.compile, which takes most of the time",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes, 2 repeats, no compile: does it run"
    )
    arguments = parser.parse_args(argv)
    asked = arguments.section or list(SECTIONS)
    arguments.sections = [name for name in SECTIONS if name in asked]
    if arguments.smoke:
        arguments.repeats, arguments.warmup, arguments.compile = 2, 1, False
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    arguments = parse(argv)
    reason = bench_ops.unavailable("cuda")
    if reason is not None:
        print(f"bench.retrieval: {reason}", file=sys.stderr)
        return 1
    where = machine(torch.device("cuda"))
    print("\n".join(f"{key}: {value}" for key, value in where.items()))
    print(f"bfloat16, cold caches, median [quartiles] of {arguments.repeats}, microseconds")
    wrong = run(arguments, where)
    for message in wrong:
        print(f"wrong: {message}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
