"""Nsight Systems: its command lines, as its manual has them.

    python -m ultramem_cuda.profiling.nsight.nsys memory_layer_training

prints the two to run: one records a timeline of a target, the other sums it up.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import targets
from .ncu import target_program

__all__ = ["REPORTS", "profile_command", "stats_command"]

REPORTS = ("nvtx_sum", "cuda_gpu_kern_sum", "nvtx_kern_sum")
"""Of ``nsys stats``: host time of each range, GPU time of each kernel, kernels of each range."""


def profile_command(
    program: Sequence[str], output: Path, *, from_start: bool = False, nsys: str = "nsys"
) -> list[str]:
    """The command line that records a timeline.

    Args:
        program: what to run, with its arguments.
        output: of the report, without its suffix ".nsys-rep".
        from_start: False: only between the program's cudaProfilerStart and cudaProfilerStop.
        nsys: the executable.
    """
    arguments = [
        *(nsys, "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none"),
        # Kernels of CUDA graphs one by one; by default a graph's replay is one bar.
        "--cuda-graph-trace=node",
    ]
    if not from_start:
        arguments += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    return [*arguments, f"--output={output}", "--force-overwrite=true", *program]


def stats_command(
    report: Path, reports: Sequence[str] = REPORTS, *, nsys: str = "nsys"
) -> list[str]:
    """The command line that sums up a report in tables."""
    arguments = [nsys, "stats", "--force-export=true"]
    for name in reports:
        arguments += ["--report", name]
    return [*arguments, str(report)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ultramem_cuda.profiling.nsight.nsys",
        description="Prints the command lines that record and sum up a timeline of a target.",
    )
    parser.add_argument("target", choices=targets.TARGETS)
    targets.add_arguments(parser)
    parser.add_argument("--output", type=Path, help="of the report, without suffix")
    options = parser.parse_args(arguments)
    output = options.output or Path(options.target)
    program = target_program(options.target, options.shape, options.tokens, options.passes)
    print(shlex.join(profile_command(program, output)))
    print(shlex.join(stats_command(output.with_name(output.name + ".nsys-rep"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
