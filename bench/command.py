"""What the benches on a GPU share: sections, their command line, and how they run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ultramem_cuda.profiling.timing import machine, write_json

from . import ops as bench_ops
from .record import item_entries, summary
from .report import Quantity, Row, quantities, table
from .retrieval_cases import Settings, release_memory
from .shapes import SHAPES, SMOKE, Shape

Measured = Row | Quantity
Measure = Callable[[Settings, Shape, list[str]], Iterator[Measured]]
"""Measures at one shape, and appends what was wrong to the list."""

# Those that a section may be asked for.
STANDARD = "SBML"
DTYPE = "bfloat16"
WARMUP = 3
SMOKE_REPEATS, SMOKE_WARMUP = 2, 1


@dataclass(frozen=True)
class Section:
    what: str
    measure: Measure
    shapes: str = ""
    """Names of the standard shapes of which --shape chooses."""
    own: tuple[Shape, ...] = ()
    """Shapes that it has whatever --shape says."""

    def shapes_of(self, names: Sequence[str], smoke: bool) -> list[Shape]:
        if smoke:
            return [SMOKE]
        return [*(SHAPES[name] for name in names if name in self.shapes), *self.own]


@dataclass(frozen=True)
class Bench:
    """Sections that are run by one command, on a GPU, bfloat16, cold caches."""

    name: str
    """That of the module."""
    description: str
    sections: Mapping[str, Section]
    repeats: int
    shape_help: str
    compiles: bool = False
    """Whether it has peers under torch.compile."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """By name, for the record."""

    @property
    def shape_names(self) -> list[str]:
        return [n for n in STANDARD if any(n in s.shapes for s in self.sections.values())]

    def shape_records(self) -> list[dict[str, Any]]:
        """All that it may measure, for the record."""
        shapes = [SHAPES[name] for name in self.shape_names]
        shapes += [s for section in self.sections.values() for s in section.own if s not in shapes]
        return [dataclasses.asdict(shape) for shape in shapes]


@dataclass
class Failures:
    """What went wrong so far."""

    wrong: list[str] = field(default_factory=list)
    out_of_memory: list[str] = field(default_factory=list)


def measure_sections(
    bench: Bench,
    sections: Sequence[str],
    shapes: Sequence[str],
    settings: Settings,
    failures: Failures,
) -> Iterator[tuple[str, list[Measured]]]:
    """Section by section, what was measured; rows are printed to stderr as they come.

    A shape that breaks down, or does not fit, takes nothing else with it.
    """
    for name in sections:
        section = bench.sections[name]
        measured: list[Measured] = []
        for shape in section.shapes_of(shapes, settings.smoke):
            begin = time.perf_counter()
            items = section.measure(settings, shape, failures.wrong)
            for item in _guarded(items, f"{name}, {shape.name}", failures):
                measured.append(item)
                line = summary(item_entries(bench.name, name, item.record()))
                print(f"  {line}", file=sys.stderr, flush=True)
            release_memory()
            seconds = time.perf_counter() - begin
            print(f"  {name}, {shape.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        yield name, measured


def _guarded(items: Iterator[Measured], where: str, failures: Failures) -> Iterator[Measured]:
    try:
        yield from items
    except torch.OutOfMemoryError:
        failures.out_of_memory.append(where)
        print(f"{where}: out of memory", file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        failures.wrong.append(f"{where}: {error}")


def describe(measured: Sequence[Measured]) -> str:
    """Times, then amounts."""
    rows = [item for item in measured if isinstance(item, Row)]
    amounts = [item for item in measured if isinstance(item, Quantity)]
    parts = [table(rows)] if rows else []
    parts += [quantities(amounts)] if amounts else []
    return "\n\n".join(parts) or "nothing was measured"


# ---- one bench as a command ----------------------------------------------------------------------


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How often, from which seed, or just whether: the same for every command."""
    parser.add_argument(
        "--warmup", type=int, default=WARMUP, help="untimed runs of each (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, 2 repeats: does it run")


def section_help(bench: Bench) -> str:
    return "; ".join(f"{name}: {section.what}" for name, section in bench.sections.items())


COMPILE_HELP = "--no-compile, and --smoke: no peers under torch.compile, most of the time"


def parse_bench(bench: Bench, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with the sections that were asked for, in their order, as ``sections``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{bench.name}",
        description=bench.description,
        epilog=section_help(bench),
    )
    parser.add_argument("--section", nargs="+", choices=bench.sections, help="default: all")
    names = bench.shape_names
    parser.add_argument("--shape", nargs="+", choices=names, default=names, help=bench.shape_help)
    parser.add_argument(
        "--repeats",
        type=int,
        default=bench.repeats,
        help="timed runs of each (default %(default)s)",
    )
    add_run_options(parser)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record here")
    if bench.compiles:
        parser.add_argument(
            "--compile", action=argparse.BooleanOptionalAction, default=True, help=COMPILE_HELP
        )
    arguments = parser.parse_args(argv)
    asked = arguments.section or list(bench.sections)
    arguments.sections = [name for name in bench.sections if name in asked]
    arguments.compile = bench.compiles and arguments.compile and not arguments.smoke
    if arguments.smoke:
        arguments.repeats, arguments.warmup = SMOKE_REPEATS, SMOKE_WARMUP
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    return arguments


def run_bench(bench: Bench, arguments: argparse.Namespace, where: Mapping[str, Any]) -> list[str]:
    """Measures and prints section by section; returns what was wrong.

    The record is written after each section.
    """
    failures = Failures()
    records: dict[str, Any] = {}
    record = {
        "bench": bench.name,
        "machine": where,
        "dtype": DTYPE,
        "repeats": arguments.repeats,
        "smoke": arguments.smoke,
        "shapes": bench.shape_records(),
        **bench.notes,
        "sections": records,
        "out_of_memory": failures.out_of_memory,
        "wrong": failures.wrong,
    }
    settings = Settings(
        torch.device("cuda"),
        arguments.repeats,
        arguments.warmup,
        arguments.compile,
        arguments.seed,
        arguments.smoke,
    )
    sections = measure_sections(bench, arguments.sections, arguments.shape, settings, failures)
    for name, measured in sections:
        print(f"\n{name}: {bench.sections[name].what}\n\n{describe(measured)}", flush=True)
        records[name] = [item.record() for item in measured]
        if arguments.json is not None:
            write_json(arguments.json, record)
    return failures.wrong


def bench_main(bench: Bench, argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    arguments = parse_bench(bench, argv)
    reason = bench_ops.unavailable("cuda")
    if reason is not None:
        print(f"bench.{bench.name}: {reason}", file=sys.stderr)
        return 1
    where = machine(torch.device("cuda"))
    print("\n".join(f"{key}: {value}" for key, value in where.items()))
    print(f"{DTYPE}, cold caches, median [quartiles] of {arguments.repeats}, microseconds")
    wrong = run_bench(bench, arguments, where)
    report_wrong(wrong)
    return 1 if wrong else 0


def report_wrong(wrong: Sequence[str]) -> None:
    for message in wrong:
        print(f"wrong: {message}", file=sys.stderr)
