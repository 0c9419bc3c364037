"""``python -m bench``: the benches of retrieval, the value FFN and steps in one run, one record."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ultramem_cuda.profiling.timing import machine, write_json

from . import graph_step, retrieval, value_ffn
from . import ops as bench_ops
from .command import (
    COMPILE_HELP,
    DTYPE,
    SMOKE_REPEATS,
    SMOKE_WARMUP,
    STANDARD,
    Bench,
    Failures,
    add_run_options,
    measure_sections,
    report_wrong,
    section_help,
)
from .record import Record, csv_table, item_entries, markdown_table, ops_entries, summary, table
from .retrieval_cases import Settings
from .shapes import SMOKE

EXIT_OK, EXIT_WRONG, EXIT_USAGE = 0, 1, 2

BENCHES = {bench.name: bench for bench in (retrieval.BENCH, value_ffn.BENCH, graph_step.BENCH)}
# What stands for a bench where there is no GPU.
CPU_OPERATORS = {
    "retrieval": ("tucker_query", "product_key_topk"),
    "value_ffn": ("value_ffn",),
}
LEFT_OUT = "left_out"
QUICK_REPEATS = 5
# A table of 40 GB takes long to fill.
NOT_QUICK = ("large",)

Plan = list[tuple[Bench, list[str]]]
"""Benches with the sections of each that are run."""


def parse(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    names = list(dict.fromkeys(name for bench in BENCHES.values() for name in bench.sections))
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Runs every bench of the operators and layers on the GPU, bfloat16, cold "
        "caches, and writes one record and one table. Without a GPU: the CPU operators against "
        "torch eager.",
        epilog=" | ".join(f"{bench.name}: {section_help(bench)}" for bench in BENCHES.values())
        + " | exit codes: 0 whether targets are met or missed, 1 a result is wrong or a section "
        "failed, 2 wrong usage",
    )
    parser.add_argument("--only", nargs="+", choices=BENCHES, help="default: all benches")
    parser.add_argument(
        "--section", nargs="+", choices=names, metavar="SECTION", help="default: all; on a GPU"
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        choices=list(STANDARD),
        help="of sections that have no shape of their own; default: all, and cpu on the CPU",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_REPEATS} repeats, no peers under torch.compile, no section large, "
        "unless they are asked for",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where it is")
    parser.add_argument("--repeats", type=int, help="timed runs of each (default: each bench's)")
    add_run_options(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help=COMPILE_HELP)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        default=Path("ultramem-bench.json"),
        help="the record, written anew after each section (default: %(default)s)",
    )
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="the table as Markdown")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="the record as CSV")
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.repeats is None:
        arguments.repeats = QUICK_REPEATS
    if arguments.smoke:
        arguments.repeats, arguments.warmup = SMOKE_REPEATS, SMOKE_WARMUP
    if arguments.repeats is not None and arguments.repeats < 2:
        parser.error("--repeats must be at least 2")
    return arguments


def plan(arguments: argparse.Namespace) -> Plan:
    """What is run on a GPU: benches and sections that have a shape left."""
    chosen = []
    for name, bench in BENCHES.items():
        if arguments.only is not None and name not in arguments.only:
            continue
        asked = arguments.section or [
            section for section in bench.sections if not (arguments.quick and section in NOT_QUICK)
        ]
        sections = [
            section
            for section in bench.sections
            if section in asked and bench.sections[section].shapes_of(_shapes(arguments), False)
        ]
        if sections:
            chosen.append((bench, sections))
    return chosen


def _shapes(arguments: argparse.Namespace) -> Sequence[str]:
    return arguments.shape or STANDARD


# ---- running -------------------------------------------------------------------------------------


def measure_gpu(
    chosen: Plan, arguments: argparse.Namespace, device: torch.device, record: Record
) -> Iterator[None]:
    """Adds to the record, section by section."""
    compile_peers = arguments.compile
    if compile_peers is None:
        compile_peers = not arguments.quick
    for bench, sections in chosen:
        settings = Settings(
            device,
            arguments.repeats or bench.repeats,
            arguments.warmup,
            bench.compiles and compile_peers and not arguments.smoke,
            arguments.seed,
            arguments.smoke,
        )
        failures = Failures()
        wrong, out_of_memory = record.wrong, record.out_of_memory
        for name, measured in measure_sections(
            bench, sections, _shapes(arguments), settings, failures
        ):
            for item in measured:
                record.entries += item_entries(bench.name, name, item.record())
            record.wrong = wrong + _prefixed(bench, failures.wrong)
            record.out_of_memory = out_of_memory + _prefixed(bench, failures.out_of_memory)
            yield


def _prefixed(bench: Bench, messages: Sequence[str]) -> list[str]:
    return [f"{bench.name}: {message}" for message in messages]


def cpu_arguments(arguments: argparse.Namespace, operator: str) -> argparse.Namespace:
    """Those of bench.ops for one operator."""
    argv = ["--device", "cpu", "--op", operator]
    argv += ["--warmup", str(arguments.warmup), "--seed", str(arguments.seed)]
    if arguments.repeats is not None:
        argv += ["--repeats", str(arguments.repeats)]
    if arguments.shape is not None:
        argv += ["--shape", *arguments.shape]
    argv += [f"--{name}" for name in ("compile", "smoke") if getattr(arguments, name)]
    return bench_ops.parse(argv)


def measure_cpu(arguments: argparse.Namespace, record: Record) -> Iterator[None]:
    """Adds to the record, operator by operator."""
    for name, operators in CPU_OPERATORS.items():
        if arguments.only is not None and name not in arguments.only:
            continue
        for operator in operators:
            try:
                rows, wrong = bench_ops.run(cpu_arguments(arguments, operator))
            except Exception as error:
                traceback.print_exc()
                rows, wrong = [], [f"{operator}: {error}"]
            for row in rows:
                entries = ops_entries(row.record())
                print(f"  {summary(entries)}", file=sys.stderr, flush=True)
                record.entries += entries
            record.wrong += [f"ops: {message}" for message in wrong]
            yield


def write(record: Record, arguments: argparse.Namespace) -> None:
    """The record, and the tables that were asked for."""
    write_json(arguments.json, record.to_json())
    for path, text in ((arguments.markdown, markdown_table), (arguments.csv, csv_table)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(record.entries), encoding="utf-8")


def main(argv: Sequence[str] | None = None, prog: str = "python -m bench") -> int:
    """Exit status 0 whether targets are met or missed; 1 where a result is wrong or unavailable."""
    arguments = parse(argv, prog)
    no_gpu = bench_ops.unavailable("cuda")
    device = arguments.device or ("cuda" if no_gpu is None else "cpu")
    reason = bench_ops.unavailable(device)
    if reason is not None:
        print(f"{prog}: {reason}", file=sys.stderr)
        return EXIT_WRONG
    chosen = plan(arguments)
    why_cpu = no_gpu or "--device cpu"
    if device == "cpu" and arguments.section is not None:
        return _refuse(prog, f"--section: all sections need a GPU ({why_cpu})")
    if device == "cuda" and not chosen:
        return _refuse(prog, "no section of those benches has that name and such a shape")

    if device == "cpu":
        record = _cpu_record(arguments, why_cpu)
        measuring = measure_cpu(arguments, record)
    else:
        record = _gpu_record(arguments, chosen)
        measuring = measure_gpu(chosen, arguments, torch.device(device), record)
    try:
        write(record, arguments)
    except OSError as error:
        return _refuse(prog, f"cannot write {error.filename}: {error.strerror}")
    _print_heading(record)
    for _ in measuring:
        write(record, arguments)
    print(table(record.entries))
    for message in record.out_of_memory:
        print(f"out of memory: {message}", file=sys.stderr)
    report_wrong(record.wrong)
    print(f"record: {arguments.json}", file=sys.stderr)
    return EXIT_WRONG if record.wrong else EXIT_OK


def _refuse(prog: str, reason: str) -> int:
    print(f"{prog}: error: {reason}", file=sys.stderr)
    return EXIT_USAGE


def _gpu_record(arguments: argparse.Namespace, chosen: Plan) -> Record:
    shapes = [dataclasses.asdict(SMOKE)]
    if not arguments.smoke:
        every = [shape for bench, _ in chosen for shape in bench.shape_records()]
        shapes = [shape for i, shape in enumerate(every) if shape not in every[:i]]
    notes = {name: note for bench, _ in chosen for name, note in bench.notes.items()}
    where = machine(torch.device("cuda"))
    return Record(where, DTYPE, True, shapes, _settings(arguments), notes)


def _cpu_record(arguments: argparse.Namespace, why_cpu: str) -> Record:
    options = cpu_arguments(arguments, bench_ops.OPERATORS[0])
    return Record(
        machine(torch.device("cpu")),
        options.dtype,
        options.cold,
        [dataclasses.asdict(shape) for shape in options.shapes],
        _settings(arguments),
        {LEFT_OUT: f"The GPU benches were left out: {why_cpu}."},
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("only", "section", "shape", "quick", "repeats", "warmup", "seed", "compile", "smoke")
    return {name: getattr(arguments, name) for name in names}


def _print_heading(record: Record) -> None:
    lines = [f"{key}: {value}" for key, value in record.machine.items()]
    caches = "cold" if record.cold else "warm"
    lines.append(f"{record.dtype}, {caches} caches, median [quartiles]")
    if LEFT_OUT in record.notes:
        lines += ["", record.notes[LEFT_OUT]]
    print("\n".join(lines), end="\n\n", flush=True)
