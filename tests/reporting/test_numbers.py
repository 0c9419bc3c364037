"""Numbers as people read them."""

from __future__ import annotations

import pytest

from ultramem_cuda.reporting import numbers


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (0.0, 3, "0"),
        (1234.5, 3, "1,230"),
        (1234.5, 6, "1,234.50"),
        (0.031234, 3, "0.0312"),
        (99.96, 3, "100.0"),
        (-5.25, 2, "-5.2"),
        (3e-7, 2, "0.00000030"),
        (2.1e12, 2, "2,100,000,000,000"),
    ],
)
def test_significant_digits(number: float, digits: int, text: str) -> None:
    assert numbers.significant(number, digits) == text


def test_units() -> None:
    assert numbers.seconds_text(85.3e-6) == "85.3 µs"
    assert numbers.seconds_text(1.5) == "1.5 s"
    assert numbers.seconds_text(4e-9) == "4 ns"
    assert numbers.bytes_text(100e6) == "100 MB"
    assert numbers.bytes_text(999) == "999 B"
    assert numbers.bytes_text(0) == "0 B"
    assert numbers.joules_text(0.0023) == "2.3 mJ"
    assert numbers.count_text(8192) == "8.19k"
    assert numbers.count_text(64) == "64"
    assert numbers.whole(65536.0) == "65,536"
