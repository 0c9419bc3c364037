"""The tools that read the native library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def cuobjdump() -> str:
    """CUDA's disassembler, from the toolkit or from its PyPI package."""
    on_path = shutil.which("cuobjdump")
    packaged = [str(f) for base in sys.path for f in Path(base).glob("nvidia/*/bin/cuobjdump")]
    assert on_path or packaged, "cuobjdump is missing; requirements.txt installs it"
    return on_path or packaged[0]


def tool(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout
