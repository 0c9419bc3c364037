"""Every instruction set of the CPU kernels passes the same tests."""

from __future__ import annotations

import os

import pytest
from helpers import run_python

from ultramem_cuda import _library

ORDER = ["DEFAULT", "AVX2", "AVX512"]
# Accuracy against the reference, ties and tails; on the CPU only.
TESTS = [
    "test_op_rms_norm.py::test_fixed_shapes",
    "test_op_product_key_topk.py::test_fixed_shapes",
    "test_op_product_key_hard_cases.py::test_number_of_keys_around_multiples_of_vector_widths",
    "test_op_product_key_hard_cases.py::test_key_dimension_around_multiples_of_vector_widths",
    "test_op_product_key_hard_cases.py::test_nan_ranks_below_negative_infinity",
    "test_op_product_key_hard_cases.py::test_identical_keys_go_by_the_lower_id",
    "test_op_value_ffn.py::test_fixed_shapes",
    "test_op_value_ffn.py::test_activations",
    "test_op_value_ffn.py::test_row_widths_around_multiples_of_vector_widths",
]
# Those of the fixed shapes that are large: vectors and their tails are in the others as well.
SELECTED = "not 4096 and not 1138 and not -small and not -layer and not -bag"


def expected_capability(requested: str) -> str:
    """The requested one, or what the machine has if that is less."""
    native = ORDER.index(_library.cpu_capability())
    return ORDER[min(native, ORDER.index(requested.upper()))]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_capability_passes_too(capability: str) -> None:
    folder = os.path.dirname(__file__)
    paths = [os.path.join(folder, test) for test in TESTS]
    code = f"""
import sys
import pytest
from ultramem_cuda import _library
print("capability", _library.cpu_capability())
options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", {SELECTED!r}]
sys.exit(pytest.main([*options, *{paths!r}]))
"""
    done = run_python(code, env={"ULTRAMEM_CPU_CAPABILITY": capability})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"capability {expected_capability(capability)}\n")


def test_highest_capability_is_never_beyond_the_machine() -> None:
    code = "from ultramem_cuda import _library; print(_library.cpu_capability())"
    done = run_python(code, env={"ULTRAMEM_CPU_CAPABILITY": "avx512"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected_capability("avx512")
