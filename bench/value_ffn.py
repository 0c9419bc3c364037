"""``python -m bench.value_ffn``: the value FFN, deferred gradients and optimizers against their
targets and floors."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import ops as bench_ops
from . import value_ffn_cases as cases
from .report import Quantity, Row, quantities, table
from .retrieval_cases import Settings
from .shapes import SHAPES, SMOKE, Shape
from .timing import machine, write_json
from .value_ffn_large import large_rows, large_shape
from .value_ffn_layer import layer_measures

Measure = Callable[[Settings, Shape, list[str]], Iterator[Any]]


class Section(NamedTuple):
    what: str
    shapes: str
    measure: Measure


SECTIONS = {
    "table": Section("value_ffn forward, backward dense and deferred", "SBM", cases.table_rows),
    "step": Section("optimizer steps after all layers' backwards", "SM", cases.step_rows),
    "training": Section("value_ffn and step, a layer's share", "SM", cases.training_rows),
    "layer": Section("UltraMemLayer, deferred table, CUDA graph", "SBM", layer_measures),
    "state": Section("bytes of weights and optimizer states", "SM", cases.state_quantities),
    "large": Section("a table of 20e9 elements", "", large_rows),
}


def shapes_of(arguments: argparse.Namespace, name: str) -> list[Shape]:
    if arguments.smoke:
        return [SMOKE]
    if not SECTIONS[name].shapes:
        return [large_shape()]
    return [SHAPES[shape] for shape in arguments.shape if shape in SECTIONS[name].shapes]


def run(arguments: argparse.Namespace, where: dict[str, Any]) -> list[str]:
    """Measures and prints section by section; returns what was wrong.

    The record is written after each. A shape that breaks down, or does not fit, takes nothing else
    with it.
    """
    wrong: list[str] = []
    out_of_memory: list[str] = []
    records: dict[str, Any] = {}
    record = {
        "machine": where,
        "dtype": "bfloat16",
        "repeats": arguments.repeats,
        "smoke": arguments.smoke,
        "shapes": [dataclasses.asdict(s) for s in (*map(SHAPES.get, "SBM"), large_shape()) if s],
        "step_floor": cases.STEP_FLOOR,
        "sections": records,
        "out_of_memory": out_of_memory,
        "wrong": wrong,
    }
    for name in arguments.sections:
        print(f"\n{name}: {SECTIONS[name].what}\n", flush=True)
        measured: list[Row | Quantity] = []
        for shape in shapes_of(arguments, name):
            begin = time.perf_counter()
            try:
                for item in SECTIONS[name].measure(settings_for(arguments), shape, wrong):
                    measured.append(item)
            except torch.OutOfMemoryError:
                out_of_memory.append(f"{name}, {shape.name}")
                print(f"{name}, {shape.name}: out of memory", file=sys.stderr)
            except Exception as error:
                traceback.print_exc()
                wrong.append(f"{name}, {shape.name}: {error}")
            cases.release_memory()
            seconds = time.perf_counter() - begin
            print(f"  {name}, {shape.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        print(describe(measured), flush=True)
        records[name] = [item.record() for item in measured]
        if arguments.json is not None:
            write_json(arguments.json, record)
    return wrong


def settings_for(arguments: argparse.Namespace) -> Settings:
    return Settings(
        torch.device("cuda"),
        (),
        arguments.repeats,
        arguments.warmup,
        compile=False,
        seed=arguments.seed,
        smoke=arguments.smoke,
    )


def describe(measured: Sequence[Row | Quantity]) -> str:
    """Times, then amounts."""
    rows = [item for item in measured if isinstance(item, Row)]
    amounts = [item for item in measured if isinstance(item, Quantity)]
    parts = [table(rows)] if rows else []
    parts += [quantities(amounts)] if amounts else []
    return "\n\n".join(parts) or "nothing was measured"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.value_ffn",
        description="Times value_ffn, optimizers and layers on a GPU, bfloat16, cold caches.",
        epilog="; ".join(f"{name}: {section.what}" for name, section in SECTIONS.items()),
    )
    parser.add_argument("--section", nargs="+", choices=SECTIONS, help="default: all")
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=list("SBM"),
        default=list("SBM"),
        help="step, training and state have no B; large has a shape of its own",
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed runs of each (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    parser.add_argument("--smoke", action="store_true", help="tiny, 2 repeats: does it run")
    arguments = parser.parse_args(argv)
    asked = arguments.section or list(SECTIONS)
    arguments.sections = [name for name in SECTIONS if name in asked]
    if arguments.smoke:
        arguments.repeats, arguments.warmup = 2, 1
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    arguments = parse(argv)
    reason = bench_ops.unavailable("cuda")
    if reason is not None:
        print(f"bench.value_ffn: {reason}", file=sys.stderr)
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
