"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def significant(number: float, digits: int = 3) -> str:
    """A number with that many significant digits, never with an exponent: "1,240", "0.0312"."""
    if number == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(number)))
    return f"{round(number, decimals):,.{max(0, decimals)}f}"


def short(number: float, digits: int = 3) -> str:
    """The same without zeros at the end of a fraction: "100" for "100.0", for ticks."""
    text = significant(number, digits)
    return text.rstrip("0").rstrip(".") if "." in text else text


def scaled(number: float, units: Sequence[tuple[float, str]], digits: int = 3) -> str:
    """A number in the largest unit it reaches, or the last: ``units`` are (size, name)."""
    size, unit = next((one for one in units if abs(number) >= one[0]), units[-1])
    return f"{short(number / size, digits)} {unit}".rstrip()


def count_text(number: float) -> str:
    """ "1.02M", "8.19k", "64"."""
    return scaled(number, ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))).replace(" ", "")


def bytes_text(number: float) -> str:
    return scaled(number, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def seconds_text(number: float) -> str:
    return scaled(number, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")))


def joules_text(number: float) -> str:
    return scaled(number, ((1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"), (1e-9, "nJ")))


def whole(number: float) -> str:
    return f"{number:,.0f}"
