"""The command ``ultramem``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .._version import __version__
from ..examples.lm import arguments as lm_arguments
from ..examples.lm.errors import UsageError
from ..examples.lm.train import TrainingDiverged
from . import check, demo, doctor, profile
from .interrupts import Terminated, terminable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
# Those of a shell for a process that a signal has ended: 128 and the signal's number.
EXIT_INTERRUPTED = 130
EXIT_CUT_OFF = 141
EXIT_TERMINATED = 143


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="ultramem",
        description="Memory layers for transformers: examine the build, check it, train with it, "
        "measure it.",
        epilog="exit codes: 0 success, 1 a check failed or training broke down, 2 wrong usage, "
        "130 interrupted, 141 the reader of the output is gone, 143 terminated",
    )
    parser.add_argument("--version", action="version", version=f"ultramem {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "doctor",
        help="what is not used and why, what was built, what this machine has",
        description="Says in its first line whether operators run here, on a CPU and on a GPU; "
        "then what is not used, why, and what to do; then what was built and what this machine "
        "has. Exits with 1 where operators do not run on the device asked for.",
    )
    command.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device that the exit code is about (default: %(default)s)",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object instead")
    form.add_argument(
        "--shape",
        metavar="SHAPE",
        help="which kernels retrieval runs for this shape, and its memory: S, B, M, L or "
        "n=1138,Kd=192,M=32[,m=,R=,C=,H=,Q=,T=,dtype=bf16|fp16|fp32,mode=tucker|additive]",
    )
    command.set_defaults(run=lambda args: doctor.run(args.shape, args.device, args.json))

    command = commands.add_parser(
        "check",
        help="compare every operator and gradient with the reference",
        description="Compares every operator and its gradients, in every dtype, with the NumPy "
        "float64 reference, and prints errors beside their bounds. Exits with 1 on a failure.",
    )
    lm_arguments.add_device_argument(command, "cpu or cuda (default: both where there is a GPU)")
    command.add_argument(
        "--seed", type=_seed, metavar="N", default=0, help="of the inputs (default: 0)"
    )
    command.set_defaults(run=lambda args: check.run(args.device, args.seed))

    command = commands.add_parser(
        "train",
        help="train the example language model",
        description="Trains the byte-level language model of examples/lm with blocks of one or "
        "more kinds, matched in active parameters.",
    )
    lm_arguments.add_train_arguments(command)
    command.set_defaults(run=lm_arguments.run_train)

    command = commands.add_parser(
        "pack",
        help="pack text into one archive",
        description="Packs text into one compressed archive for --data, so that several machines "
        "train on the same bytes, and prints its digest.",
    )
    lm_arguments.add_pack_arguments(command)
    command.set_defaults(run=lm_arguments.run_pack)

    command = commands.add_parser(
        "demo",
        help="doctor, check, train every kind, count memory traffic, write a report",
        description="Runs doctor and check, trains dense, moe, pkm and ultramem_v2 on real text, "
        "counts memory traffic against MoE and writes report.html. Minutes on two CPU cores.",
    )
    lm_arguments.add_data_arguments(command)
    lm_arguments.add_device_argument(command)
    command.add_argument(
        "--out",
        type=Path,
        default=Path("ultramem-demo"),
        metavar="DIR",
        help="where the report goes (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=_seed, metavar="N", default=0, help="of weights and data (default: 0)"
    )
    command.add_argument("--steps", type=int, metavar="N", help="training steps of each kind")
    command.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="kinds trained at once (default: as many as cores, up to four; on a GPU always one)",
    )
    command.add_argument("--quiet", action="store_true", help="print summaries only")
    command.set_defaults(run=demo.run)

    # Its options, --help too, are those of `python -m bench`: here all of them are positional,
    # since no argument begins with a NUL.
    command = commands.add_parser(
        "bench",
        help="time every operator and layer, write a record and a table",
        add_help=False,
        prefix_chars="\0",
    )
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=lambda args: _bench(args.arguments))
    command = commands.add_parser(
        "profile",
        help="memory layers against mixtures of experts: time, bytes, energy, and a report",
        description="Compares memory layers with mixtures of experts of the same parameters: time, "
        "bytes by a model, by NVML and by Nsight Compute, energy, and how near the hardware's "
        "limits; at decode and in training. Writes profile.json, profile.csv and report.html. "
        "Without a GPU it counts by the model alone; whatever cannot be measured is named, and "
        "the exit code is 0.",
    )
    profile.add_arguments(command)
    command.set_defaults(run=profile.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    name = f"ultramem {args.command}"
    try:
        with terminable():
            code = _run(args, name)
            # Here and not at exit, where a failure could no longer be reported. A process may have
            # no sys.stdout at all; print knows.
            print(end="", flush=True)
        return code
    except Terminated:
        print(f"{name}: terminated", file=sys.stderr)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone.
        _discard_output()
        return EXIT_CUT_OFF
    except OSError as error:
        if error.filename is not None:
            raise
        # Only the output has no name.
        _discard_output()
        print(f"{name}: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED


def _bench(arguments: Sequence[str]) -> int:
    # No other command needs it.
    from ..bench import suite

    return suite.main(arguments, "ultramem bench")


def _run(args: argparse.Namespace, name: str) -> int:
    try:
        code: int = args.run(args)
        return code
    except UsageError as error:
        print(f"{name}: error: argument {error}", file=sys.stderr)
        return EXIT_USAGE
    except TrainingDiverged as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _discard_output() -> None:
    # What is still buffered would fail once more when the interpreter exits.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _seed(text: str) -> int:
    """What numpy and torch both take for a seed."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= lm_arguments.MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 0 to {lm_arguments.MAX_SEED}, got '{text}'"
        )
    return value
