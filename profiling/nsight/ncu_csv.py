"""What Nsight Compute writes as CSV, as bytes of each kernel; beside the model and NVML."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..record import Agreement, Bytes

__all__ = ["METRICS", "KernelBytes", "NcuError", "agreement", "base_name", "parse", "table"]

READ, WRITE, TIME = METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "gpu__time_duration.sum",
)
"""What is parsed."""

# ncu's own multiples are decimal. Older versions spell units of time out.
_UNITS = {
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12},
    **{"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9},
    **{"nsecond": 1.0, "usecond": 1e3, "msecond": 1e6, "second": 1e9},
}

# Of names in the table; triton's list all operators that they fuse.
_NAME_WIDTH = 60


class NcuError(RuntimeError):
    """Nsight Compute is missing or refused, or its output is not understood; a sentence."""


@dataclass(frozen=True)
class KernelBytes:
    """All launches of the kernels of one name."""

    kernel: str
    launches: int
    read: float
    """Bytes read from DRAM."""
    write: float
    """Bytes written to DRAM."""
    nanoseconds: float

    @property
    def bytes(self) -> float:
        return self.read + self.write

    def of_one(self, passes: int) -> KernelBytes:
        """The share of one pass, of so many alike. Launches that are no multiple are rounded."""
        return dataclasses.replace(
            self,
            launches=round(self.launches / passes),
            read=self.read / passes,
            write=self.write / passes,
            nanoseconds=self.nanoseconds / passes,
        )


def total(kernels: Iterable[KernelBytes], name: str = "all kernels") -> KernelBytes:
    """The sum of all."""
    found = list(kernels)
    return KernelBytes(
        name,
        sum(k.launches for k in found),
        sum(k.read for k in found),
        sum(k.write for k in found),
        sum(k.nanoseconds for k in found),
    )


# Namespaces without a name. ncu drops outer namespaces, and with them the bracket of "<unnamed>";
# behind a word it is that of template arguments.
_UNNAMED = re.compile(r"\(anonymous namespace\)::|(?<!\w)<unnamed>::|\bunnamed>::")
# An operator's own characters are no brackets. Of "operator ()" the first pair is its name.
_OPERATOR = re.compile(r"\boperator ?(\(\)|\[\]|->\*?|<=>|<<=?|>>=?|[<>]=?)")
_CLOSED_BY = {"(": ")", "<": ">", "[": "]", "{": "}"}
# Templates that do nothing but call their argument, by which alone their kernels differ.
_WRAPPER = re.compile(r"\b(device_kernel|Kernel2?|_kernel_agent)$")
# Around the argument, what chooses by architecture whether there is any code.
_GUARD = re.compile(r"\benable_\w+$")


def base_name(kernel: str) -> str:
    """A demangled kernel's name without return type, template arguments and parameters.

    Lambdas are called "lambda". Of CUTLASS's ``device_kernel<X<..>, ..>`` and its like the name of
    what they run is kept, too: ``cutlass::device_kernel<X>``. Names may have lost their beginning,
    as ncu cuts them; one of which nothing is left is returned whole.
    """
    name, arguments = _outside_brackets(_UNNAMED.sub("", kernel))
    if _WRAPPER.search(name) and arguments:
        wrapped, its_own = _outside_brackets(arguments)
        if _GUARD.search(wrapped) and its_own:
            wrapped, _ = _outside_brackets(its_own)
        return f"{name}<{wrapped}>"
    return name or kernel


def _outside_brackets(kernel: str) -> tuple[str, str]:
    """The first name in a list, and the template arguments with which it ends."""
    outside: list[str] = []
    arguments = ""
    position = 0
    while position < len(kernel):
        character = kernel[position]
        if operator := _OPERATOR.match(kernel, position):
            outside.append(f"operator{operator[1]}")
            position = operator.end()
            continue
        if character == ",":
            break
        if character not in _CLOSED_BY:
            # A bracket that closes nothing is left of a name that was cut.
            if character not in ")>]}":
                outside.append(character)
                arguments = ""
            position += 1
            continue
        end = _closing(kernel, position)
        if character == "(" and not kernel.startswith("::", end):
            break  # the parameters; of a function that holds a lambda or a class they go on
        if character == "<":
            arguments = kernel[position + 1 : end - 1]
        elif character == "[":
            outside.append("lambda")
        position = end
    words = "".join(outside).split()
    return (words[-1] if words else ""), arguments


def _closing(text: str, start: int) -> int:
    """Behind the bracket that closes the one at start; the end where it was cut off."""
    awaited: list[str] = []
    position = start
    while position < len(text):
        if operator := _OPERATOR.match(text, position):
            position = operator.end()
            continue
        character = text[position]
        position += 1
        if character in _CLOSED_BY:
            awaited.append(_CLOSED_BY[character])
        elif character == ">":
            # In parentheses it may be an arrow or a comparison.
            if awaited[-1] == ">":
                awaited.pop()
        elif character in awaited:
            # Closes comparisons, too, that opened a bracket inside.
            while awaited.pop() != character:
                pass
        if not awaited:
            return position
    return len(text)


# ---- parsing -------------------------------------------------------------------------------------


def parse(text: str) -> list[KernelBytes]:
    """Kernels of a CSV in either of ncu's formats, those with the most bytes first.

    The wide one (``--page raw``) has a column a metric and a row of units under the header; the
    long one a row a metric, "Metric Name", "Metric Unit", "Metric Value". Lines that are not of the
    table (``==PROF==``, the program's own output) are passed over.

    Raises:
        NcuError: there is no table, it lacks one of METRICS, or a value is no number.
    """
    header, rows = _table(text)
    samples = _long(header, rows) if "Metric Name" in header else _wide(header, rows)
    launches: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for kernel, launch, metric, value in samples:
        launches.setdefault(base_name(kernel), {}).setdefault(launch, {})[metric] = value
    if not launches:
        raise NcuError("ncu: its CSV has no kernel; nothing ran in the range that was profiled")
    found = []
    for kernel, values in launches.items():
        for metric in METRICS:
            if any(metric not in launch for launch in values.values()):
                raise NcuError(f"ncu: its CSV has no {metric} of {kernel}; was it collected?")
        sums = [sum(launch[metric] for launch in values.values()) for metric in METRICS]
        found.append(KernelBytes(kernel, len(values), *sums))
    return sorted(found, key=lambda k: -k.bytes)


def _table(text: str) -> tuple[list[str], list[list[str]]]:
    lines = iter(text.splitlines())
    header = next((row for row in csv.reader(lines) if {"ID", "Kernel Name"} <= set(row)), None)
    if header is None:
        raise NcuError("ncu: no CSV in its output (no line with a column 'Kernel Name')")
    rows = []
    for row in csv.reader(lines):
        if len(row) == len(header):
            rows.append(row)
        elif len(row) > 1 and row[0].isdigit():
            raise NcuError(
                f"ncu: a row of its CSV has {len(row)} cells where the header has {len(header)}; "
                "it may have been cut short"
            )
    # Of several processes each may print a header of its own.
    return header, [row for row in rows if row != header]


Sample = tuple[str, tuple[str, ...], str, float]
"""Kernel, launch, metric, value."""


def _launch(row: dict[str, str]) -> tuple[str, ...]:
    """IDs are counted by ncu, but anew for each process."""
    return row["ID"], row.get("Process ID", "")


def _wide(header: list[str], rows: list[list[str]]) -> Iterator[Sample]:
    if not rows:
        return
    # The first row names units and belongs to no launch.
    units = dict(zip(header, rows[0], strict=True))
    if units["ID"]:
        raise NcuError("ncu: the row of units is missing under the header of its CSV")
    for cells in rows[1:]:
        row = dict(zip(header, cells, strict=True))
        for metric in METRICS:
            if metric in row:
                value = _number(row["Kernel Name"], metric, row[metric], units[metric])
                yield row["Kernel Name"], _launch(row), metric, value


def _long(header: list[str], rows: list[list[str]]) -> Iterator[Sample]:
    for cells in rows:
        row = dict(zip(header, cells, strict=True))
        metric = row["Metric Name"]
        if metric in METRICS:
            value = _number(row["Kernel Name"], metric, row["Metric Value"], row["Metric Unit"])
            yield row["Kernel Name"], _launch(row), metric, value


def _number(kernel: str, metric: str, text: str, unit: str) -> float:
    if unit not in _UNITS:
        raise NcuError(f"ncu: {metric} of {base_name(kernel)} has the unit {unit!r}, not known")
    if not re.fullmatch(r"[\d,]+(\.\d+)?(e[+-]?\d+)?", text):
        raise NcuError(
            f"ncu: {metric} of {base_name(kernel)} is {text!r}, not a number; the GPU may not "
            "offer this metric, or another tool holds its counters"
        )
    return float(text.replace(",", "")) * _UNITS[unit]


# ---- beside the model ----------------------------------------------------------------------------


def agreement(
    what: str,
    kernels: Sequence[KernelBytes],
    *,
    passes: int,
    model: Bytes,
    nvml: float | None = None,
) -> Agreement:
    """One pass by the model, by NVML (bytes of a pass, or None) and by ncu."""
    one = total(kernels).of_one(passes)
    return Agreement(what, model.upper, nvml, one.bytes, one.read, one.write)


def table(
    kernels: Sequence[KernelBytes],
    *,
    passes: int,
    model: Bytes | None = None,
    nvml: float | None = None,
) -> str:
    """One pass in text: bytes of each kernel and of all, and what they should add up to.

    Names longer than 60 characters are cut in the middle.
    """
    of_one = [_shortened(kernel.of_one(passes)) for kernel in kernels]
    everything = total(of_one)
    width = max(len("model, each row once"), *(len(k.kernel) for k in [*of_one, everything]))
    lines = [
        f"{'kernel':{width}}  launches   read MB  write MB    all MB        us  TB/s",
        *(_line(kernel, width) for kernel in of_one),
        _line(everything, width),
    ]
    others = {}
    if model is not None:
        others = {"model": model.upper, "model, each row once": model.lower}
    if nvml is not None:
        others["NVML"] = nvml
    for name, value in others.items():
        ratio = f"ncu / this: {everything.bytes / value:.3f}" if value else ""
        lines.append(f"{name:{width}}  {'':8}  {'':8}  {'':8}  {value / 1e6:8.1f}  {ratio}")
    return "\n".join(lines)


def _shortened(kernel: KernelBytes) -> KernelBytes:
    """With a name that fits into the table; its beginning and its end tell kernels apart."""
    name = kernel.kernel
    if len(name) <= _NAME_WIDTH:
        return kernel
    tail = (_NAME_WIDTH - len("...")) // 2
    head = _NAME_WIDTH - len("...") - tail
    return dataclasses.replace(kernel, kernel=f"{name[:head]}...{name[-tail:]}")


def _line(kernel: KernelBytes, width: int) -> str:
    # A byte a nanosecond is a gigabyte a second.
    rate = kernel.bytes / kernel.nanoseconds / 1e3 if kernel.nanoseconds else 0.0
    return (
        f"{kernel.kernel:{width}}  {kernel.launches:8}  {kernel.read / 1e6:8.1f}  "
        f"{kernel.write / 1e6:8.1f}  {kernel.bytes / 1e6:8.1f}  {kernel.nanoseconds / 1e3:8.1f}  "
        f"{rate:4.2f}"
    )
