"""``python -m bench.value_ffn``: the value FFN, deferred gradients and optimizers against their
targets and floors."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ultramem_cuda.profiling.timing import write_json

from . import value_ffn_cases as cases
from .command import parse_sections, run_on_gpu, section_parser
from .report import Quantity, Row, quantities, table
from .retrieval_cases import Settings
from .shapes import SHAPES, SMOKE, Shape
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
    sections = {name: section.what for name, section in SECTIONS.items()}
    parser = section_parser(
        "bench.value_ffn",
        "Times value_ffn, optimizers and layers on a GPU, bfloat16, cold caches.",
        sections,
        shapes="SBM",
        shape_help="step, training and state have no B; large has a shape of its own",
        repeats=20,
    )
    return parse_sections(parser, sections, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    return run_on_gpu("bench.value_ffn", parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())
