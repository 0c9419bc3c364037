"""``python -m bench.retrieval``: retrieval against its targets, its peers and itself."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ultramem_cuda.profiling.timing import write_json

from . import retrieval_cases as cases
from .command import parse_sections, run_on_gpu, section_parser
from .report import Row, table, verdict
from .shapes import SHAPES, SMOKE

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
    parser = section_parser(
        "bench.retrieval",
        "Times tucker_query and product_key_topk on a GPU, bfloat16, cold caches.",
        SECTIONS,
        shapes="SBML",
        shape_help="shapes of the sections table, query and decode (the last two have no L)",
        repeats=25,
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-compile, and --smoke: no peer under torch.compile, which takes most of the time",
    )
    arguments = parse_sections(parser, SECTIONS, argv)
    arguments.compile = arguments.compile and not arguments.smoke
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    return run_on_gpu("bench.retrieval", parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())
