"""``ultramem profile``: memory layers against mixtures of experts, measured, and a report."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..examples.lm.errors import UsageError

if TYPE_CHECKING:
    from ..profiling.analysis import Comparison, Quantity
    from ..profiling.record import Agreement, Profile

# Fields of Settings, by the option that sets them.
_LISTS = {
    "--preset": "presets",
    "--subject": "subjects",
    "--decode-tokens": "decode_tokens",
    "--training-tokens": "training_tokens",
}
_SWITCHES = {
    "--model-only": ("measure", False),
    "--no-nvml": ("nvml", False),
    "--no-ncu": ("ncu", False),
    "--no-compile": ("compiled", False),
    "--all-windows": ("all_windows", True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("ultramem-profile"),
        metavar="DIR",
        help="where profile.json, profile.csv and report.html go (default: %(default)s)",
    )
    parser.add_argument(
        "--preset", nargs="+", metavar="NAME", help="227M-1.2B, 1B-7B (default: both)"
    )
    parser.add_argument(
        "--subject",
        nargs="+",
        metavar="NAME",
        help="memory, ffn, block (both side by side), moe, moe-matched, moe-fine, pkm "
        "(default: all)",
    )
    parser.add_argument(
        "--decode-tokens", nargs="*", type=int, metavar="N", help="default: 1, 4, ... 4096, 8192"
    )
    parser.add_argument(
        "--training-tokens",
        nargs="*",
        type=int,
        metavar="N",
        help="default: 1024, 4096, 8192, 16384, 65536",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few points of one preset: one to two minutes"
    )
    parser.add_argument(
        "--model-only", action="store_true", help="the byte model alone, as without a GPU"
    )
    parser.add_argument("--no-nvml", action="store_true", help="neither bytes nor energy by NVML")
    parser.add_argument("--no-ncu", action="store_true", help="no bytes by Nsight Compute")
    parser.add_argument("--no-compile", action="store_true", help="nothing through torch.compile")
    parser.add_argument(
        "--all-windows",
        action="store_true",
        help="bytes and energy by NVML at every point, seconds each (default: of the block, the "
        "memory layer and the mixtures compared with the block)",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="length of a window of NVML (default: 1.5)"
    )
    parser.add_argument(
        "--from-json", type=Path, metavar="FILE", help="only draw the report of this record again"
    )


def run(args: argparse.Namespace) -> int:
    """Measures what there is and reports it; 0 also where everything had to be left out."""
    from ..profiling import report

    if args.from_json is not None:
        profile = _read(args.from_json)
        with _writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
    else:
        profile = _measure(args)
    with _writing(args.out):
        files = report.write(profile, args.out)
    print(summary(profile), flush=True)
    for path in (files.json, files.csv, files.html):
        print(path.resolve())
    return 0


def _measure(args: argparse.Namespace) -> Profile:
    from ..profiling import harness, report

    try:
        make = harness.Settings.quick if args.quick else harness.Settings
        settings = make(**_given(args))
    except harness.SettingsError as error:
        raise UsageError(_option(error.name), error.problem) from error
    out: Path = args.out
    last: list[Profile] = []

    def save(profile: Profile) -> None:
        last[:] = [profile]
        with _writing(out):
            profile.write_json(out / report.JSON_NAME)

    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        return harness.profile(settings, _say, save=save, command=command_line(args))
    except KeyboardInterrupt:
        if last:
            with _writing(out):
                report.write(last[0], out)
            print(f"what was measured until now: {out.resolve()}", file=sys.stderr, flush=True)
        raise


def _say(line: str) -> None:
    print(line, flush=True)


def _read(path: Path) -> Profile:
    from ..profiling import record

    try:
        return record.read_json(path)
    except OSError as error:
        raise UsageError("--from-json", f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise UsageError("--from-json", str(error)) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError("--out", f"cannot write to '{folder}': {error.strerror}") from error


def _value(args: argparse.Namespace, option: str) -> Any:
    return getattr(args, option.removeprefix("--").replace("-", "_"))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line names."""
    given: dict[str, Any] = {
        field: tuple(value)
        for option, field in _LISTS.items()
        if (value := _value(args, option)) is not None
    }
    given |= {field: value for option, (field, value) in _SWITCHES.items() if _value(args, option)}
    if args.seconds is not None:
        given["window_seconds"] = args.seconds
    return given


def _option(field: str) -> str:
    options = {field: option for option, field in _LISTS.items()}
    return {**options, "window_seconds": "--seconds"}.get(field, field)


def command_line(args: argparse.Namespace) -> str:
    """The command that was called, without where its files go."""
    words = ["ultramem", "profile"]
    for option in _LISTS:
        if (value := _value(args, option)) is not None:
            words += [option, *map(str, value)]
    words += [option for option in ("--quick", *_SWITCHES) if _value(args, option)]
    if args.seconds is not None:
        words += ["--seconds", f"{args.seconds:g}"]
    return shlex.join(words)


# ---- what is printed -----------------------------------------------------------------------------


def summary(profile: Profile) -> str:
    """Findings, ratios and what could not be measured, as text."""
    from ..profiling import analysis

    lines: list[str] = []
    for preset in profile.presets:
        for phase in analysis.PHASES:
            for comparison in analysis.compare(profile, preset, phase):
                ours, other = comparison.ours.title, comparison.other.title
                lines += ["", f"{preset.name}, {phase}: {ours} against {other}"]
                lines += [f"  {sentence}" for sentence in analysis.findings(comparison)]
                lines += [f"  {line}" for line in _ratios(comparison)]
    if profile.agreement:
        lines += ["", "Bytes of one pass in three ways, in MB"]
        lines += [f"  {line}" for line in _agreement(profile.agreement)]
    lines += ["", *profile.notes, ""]
    return "\n".join(lines)


_RATIOS: Mapping[Quantity, str] = {
    "time": "time",
    "nvml": "bytes, NVML",
    "lower": "bytes, model, repeats cached",
    "upper": "never cached",
    "energy": "energy",
}


def _ratios(comparison: Comparison) -> list[str]:
    """Ours over the other, by number of tokens; without what was never measured."""
    shown = [quantity for quantity in _RATIOS if comparison.ratios(quantity)]
    rows = [["tokens", *(_RATIOS[quantity] for quantity in shown)]]
    for pair in comparison.pairs:
        ratios = [pair.ratio(quantity) for quantity in shown]
        rows.append([f"{pair.tokens:,}", *("-" if r is None else f"{r:.3f}" for r in ratios)])
    return _aligned(rows)


def _agreement(rows: Sequence[Agreement]) -> list[str]:
    table = [["pass", "model", "NVML", "ncu"]]
    for row in rows:
        counts = (row.model, row.nvml, row.ncu)
        table.append([row.what, *("-" if c is None else f"{c / 1e6:,.1f}" for c in counts)])
    return [*_aligned(table), *(f"{row.what}: {row.note}" for row in rows if row.note)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
