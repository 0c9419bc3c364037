"""Nsight Compute: its command line, running it, and what its refusals mean.

    python -m ultramem_cuda.profiling.nsight.ncu copy.csv --target copy --run
    python -m ultramem_cuda.profiling.nsight.ncu copy.csv --target copy

The first profiles the target and keeps ncu's CSV; both print what each kernel read from DRAM and
wrote to it, beside the model. ``--print-command`` shows the command line instead.

Caches. ncu runs a kernel alone, and once more for each group of counters that do not fit at once
(kernel replay), after it has put back what the kernel wrote. METRICS fit into one run ("1 pass" in
ncu's output), so that nothing is put back. What the kernel leaves in the L2 cache (50 MB on an
H100) is the question:

``--cache-control none`` (ours): the cache is as the kernel before left it. Lines that kernel wrote
    and that were not yet written to DRAM count for whichever kernel drives them out; the last ones
    of this kernel for the next. Over passes that repeat, what comes in so equals what goes out so:
    bytes of a pass are right, and those of one kernel within the size of the cache. Kernels that
    move many times that are right alone. It is also what NVML sees.
``--cache-control all`` (ncu's default): the cache is written back and emptied before every run, so
    that no kernel pays for another. Reads are those of cold caches, also of what the kernel before
    has just written; and what is still in the cache at the end is written by nobody: a kernel whose
    output fits there seems to write nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from . import targets
from .ncu_csv import METRICS, KernelBytes, NcuError, parse, table

__all__ = ["METRICS", "SECTION", "command", "find", "kernels_of", "refusal", "run"]

SECTION_FOLDER = Path(__file__).parent
SECTION = "UltraMemMemory"
"""Identifier of the section file beside this module, for ``--section``."""

CacheControl = Literal["none", "all"]
Page = Literal["raw", "details"]

_DEFAULT_TIMEOUT_S = 600.0

_PERMISSION = (
    "ncu: this user may not read the GPU's counters (ERR_NVGPUCTRPERM): run it as root, in a "
    "container with --cap-add SYS_ADMIN, or load the driver with "
    "NVreg_RestrictProfilingToAdminUsers=0 (docs/profiling.md)"
)
_PROGRAM_FAILED = "ncu: the profiled program failed"
# In ncu's output, and what it means; the first that is found.
_REFUSALS = (
    (r"ERR_NVGPUCTRPERM", _PERMISSION),
    (
        r"LibraryNotLoaded|Failed to initialize the profiler",
        "ncu: the driver does not offer its profiling interface here, as in a virtual machine or "
        "sandbox that does not pass it on",
    ),
    (
        r"driver resource was unavailable|ProfilerBusy|ResourceUnavailable",
        "ncu: another program holds the GPU's counters; stop it (for DCGM: dcgmi profile --pause)",
    ),
    (
        r"[Dd]river is not compatible|not supported on (this )?device|GPU not supported",
        "ncu: this version does not know the GPU or its driver; install a newer Nsight Compute",
    ),
    (
        r"unrecogni[sz]ed option|unknown option",
        "ncu: this version does not know an option of the command line; install a newer one",
    ),
    (
        r"[Ff]ailed to find metric|Unknown metric",
        "ncu: the GPU does not offer a metric that was asked for (ncu --query-metrics lists them)",
    ),
    (r"application returned an error code", _PROGRAM_FAILED),
    (
        r"No kernels were profiled",
        "ncu: no kernel was profiled: none ran inside the range, or they ran in a process or CUDA "
        "graph that ncu did not follow",
    ),
)


# ---- the command line ----------------------------------------------------------------------------


def find() -> Path | None:
    """ncu on PATH, else in the CUDA toolkit, else the newest Nsight Compute; None if nowhere."""
    on_path = shutil.which("ncu")
    if on_path is not None:
        return Path(on_path)
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(toolkit, "bin", "ncu") for toolkit in toolkits if toolkit]
    versions = Path("/opt/nvidia/nsight-compute").glob("*/ncu")
    candidates += sorted(versions, key=_version, reverse=True)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _version(executable: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", executable.parent.name))


def command(
    program: Sequence[str],
    *,
    log_file: Path,
    ncu: str | Path = "ncu",
    nvtx_range: str | None = None,
    from_start: bool = False,
    cache_control: CacheControl = "none",
    metrics: Sequence[str] = METRICS,
    sections: Sequence[str] = (),
    page: Page = "raw",
) -> list[str]:
    """The command line that profiles a program.

    Args:
        program: what to run, with its arguments.
        log_file: where ncu writes its table, apart from what the program prints.
        ncu: the executable.
        nvtx_range: only kernels launched inside an NVTX range of this name, by the thread that
            pushed it, at any depth ("ultramem::value_ffn fwd"); needs the program to push ranges.
        from_start: False: only between the program's cudaProfilerStart and cudaProfilerStop.
        cache_control: see the module.
        metrics: beside the sections; with sections alone, empty.
        sections: identifiers of section files in this package; ncu then looks for no others.
        page: "raw", a CSV with every value; "details", for people, by section.

    Raises:
        ValueError: neither metrics nor sections, or a range's name that ncu takes for a pattern.
    """
    if not metrics and not sections:
        raise ValueError("command: metrics or sections must be given")
    arguments = [
        *(str(ncu), "--target-processes", "all", "--replay-mode", "kernel"),
        # Clocks locked to their base would change times, and need rights of their own.
        *("--clock-control", "none", "--cache-control", cache_control),
        *("--profile-from-start", "on" if from_start else "off", "--nvtx"),
    ]
    if nvtx_range is not None:
        if not nvtx_range or re.search(r"[\[\]/@,*+\\]", nvtx_range):
            raise ValueError(
                f"nvtx_range: must be a name without any of [ ] / @ , * + \\, got {nvtx_range!r}"
            )
        # The slash says that it is pushed and popped, not started and ended.
        arguments += ["--nvtx-include", f"{nvtx_range}/"]
    if metrics:
        arguments += ["--metrics", ",".join(metrics)]
    if sections:
        arguments += ["--section-folder", str(SECTION_FOLDER)]
        for section in sections:
            arguments += ["--section", section]
    arguments += ["--page", page, "--print-units", "base"]
    if page == "raw":
        arguments.append("--csv")
    return [*arguments, "--log-file", str(log_file), *program]


def target_program(name: str, shape: str, tokens: int, passes: int) -> list[str]:
    """The program that runs a target of ``targets.py``."""
    sizes = ["--shape", shape, "--tokens", str(tokens), "--passes", str(passes)]
    return [sys.executable, "-m", targets.__name__, name, *sizes]


# ---- running it ----------------------------------------------------------------------------------


def refusal(output: str) -> str | None:
    """What went wrong, as a sentence with a remedy, by what ncu printed; None if nothing known."""
    for pattern, sentence in _REFUSALS:
        if re.search(pattern, output):
            return sentence
    return None


def run(arguments: Sequence[str], log_file: Path, *, timeout_s: float = _DEFAULT_TIMEOUT_S) -> str:
    """Runs a command line of :func:`command` and returns what is in its log file.

    Raises:
        NcuError: it is not there, refused, failed, or took longer than timeout_s.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log_file.unlink(missing_ok=True)
    try:
        # A group of its own, so that the profiled program ends with ncu.
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise NcuError(f"ncu: {arguments[0]} does not start: {error.strerror}") from error
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NcuError(f"ncu: not finished after {timeout_s:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    log = log_file.read_text(errors="replace") if log_file.is_file() else ""
    lines = [*log.splitlines(), *printed.splitlines()]
    messages = [line for line in lines if line.startswith("==")]
    sentence = refusal("\n".join(lines if process.returncode else messages))
    last = next((line for line in reversed(printed.splitlines()) if line.strip()), "no output")
    if sentence == _PROGRAM_FAILED:
        raise NcuError(f"{sentence}: {last}")
    if sentence is not None:
        raise NcuError(sentence)
    if process.returncode != 0:
        raise NcuError(f"ncu: exit status {process.returncode}: {last}")
    return log


def kernels_of(
    name: str,
    *,
    log_file: Path,
    shape: str = "M",
    tokens: int = 8192,
    passes: int = 3,
    cache_control: CacheControl = "none",
    timeout_s: float = _DEFAULT_TIMEOUT_S,
) -> list[KernelBytes]:
    """Profiles a target in a process of its own: its kernels, all passes together.

    Raises:
        NcuError: see :func:`run` and :func:`~.ncu_csv.parse`.
    """
    ncu = find()
    if ncu is None:
        raise NcuError(
            "ncu: Nsight Compute is not installed: not on PATH, in CUDA_HOME, /usr/local/cuda or "
            "/opt/nvidia/nsight-compute"
        )
    program = target_program(name, shape, tokens, passes)
    arguments = command(program, ncu=ncu, log_file=log_file, cache_control=cache_control)
    return parse(run(arguments, log_file, timeout_s=timeout_s))


# ---- the command ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ultramem_cuda.profiling.nsight.ncu",
        description="DRAM bytes of each kernel, by Nsight Compute, beside the model.",
    )
    parser.add_argument("file", type=Path, help="ncu's CSV: read, or with --run written first")
    parser.add_argument("--target", choices=targets.TARGETS, help="whose model to put beside it")
    targets.add_arguments(parser)
    parser.add_argument("--nvml", type=float, help="bytes of a pass by NVML, to put beside it")
    parser.add_argument("--run", action="store_true", help="profile --target now")
    parser.add_argument("--print-command", action="store_true", help="only say how to")
    parser.add_argument("--cache-control", choices=("none", "all"), default="none")
    parser.add_argument("--timeout", type=float, default=_DEFAULT_TIMEOUT_S, help="seconds")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.passes < 1:
        parser.error(f"--passes: must be positive, got {options.passes}")
    if (options.run or options.print_command) and options.target is None:
        parser.error("--run and --print-command need --target")
    if options.print_command:
        program = target_program(options.target, options.shape, options.tokens, options.passes)
        line = command(program, log_file=options.file, cache_control=options.cache_control)
        print(shlex.join(line))
        return 0
    try:
        if options.run:
            kernels = kernels_of(
                options.target,
                log_file=options.file,
                shape=options.shape,
                tokens=options.tokens,
                passes=options.passes,
                cache_control=options.cache_control,
                timeout_s=options.timeout,
            )
        else:
            kernels = parse(options.file.read_text())
    except (NcuError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    model = None
    if options.target is not None:
        model = targets.MODELS[options.target](targets.SHAPES[options.shape], options.tokens)
    print(table(kernels, passes=options.passes, model=model, nvml=options.nvml))
    return 0


if __name__ == "__main__":
    sys.exit(main())
