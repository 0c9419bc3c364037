"""The command line that `bench.retrieval` and `bench.value_ffn` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ultramem_cuda.profiling.timing import machine

from . import ops as bench_ops


def section_parser(
    name: str,
    description: str,
    sections: Mapping[str, str],
    *,
    shapes: str,
    shape_help: str,
    repeats: int,
) -> argparse.ArgumentParser:
    """Options for sections (name: what it measures), shapes, repeats and the record."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        epilog="; ".join(f"{section}: {what}" for section, what in sections.items()),
    )
    parser.add_argument("--section", nargs="+", choices=sections, help="default: all")
    parser.add_argument(
        "--shape", nargs="+", choices=list(shapes), default=list(shapes), help=shape_help
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="timed runs of each (default %(default)s)"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, help="untimed runs of each (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, 2 repeats: does it run")
    return parser


def parse_sections(
    parser: argparse.ArgumentParser, sections: Mapping[str, Any], argv: Sequence[str] | None
) -> argparse.Namespace:
    """The arguments, with the sections that were asked for, in their order, as ``sections``."""
    arguments = parser.parse_args(argv)
    asked = arguments.section or list(sections)
    arguments.sections = [name for name in sections if name in asked]
    if arguments.smoke:
        arguments.repeats, arguments.warmup = 2, 1
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    return arguments


def run_on_gpu(
    name: str,
    arguments: argparse.Namespace,
    run: Callable[[argparse.Namespace, dict[str, Any]], list[str]],
) -> int:
    """Runs with what the machine is; run returns what was wrong.

    Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable.
    """
    reason = bench_ops.unavailable("cuda")
    if reason is not None:
        print(f"{name}: {reason}", file=sys.stderr)
        return 1
    where = machine(torch.device("cuda"))
    print("\n".join(f"{key}: {value}" for key, value in where.items()))
    print(f"bfloat16, cold caches, median [quartiles] of {arguments.repeats}, microseconds")
    wrong = run(arguments, where)
    for message in wrong:
        print(f"wrong: {message}", file=sys.stderr)
    return 1 if wrong else 0
