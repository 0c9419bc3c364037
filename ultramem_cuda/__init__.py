"""UltraMemV2 memory layers (arXiv 2508.18756) on hand-written CUDA and CPU kernels.

    import ultramem_cuda as um

    config = um.UltraMemConfig.preset("227M-1.2B")
    table = um.MemoryTable.from_config(config)
    layer = um.UltraMemLayer(config, layer_index=0)
    y = x + ffn(norm(x)) + layer(norm(x), table)

The operators are in `ultramem_cuda.ops` (and under `torch.ops.ultramem`); the command is
`ultramem`.
"""

import importlib as _importlib
import typing as _typing
from pathlib import Path as _Path

from . import checkpoint, factors, init, losses, nvtx, ops, optim, stats, topology
from ._version import __version__
from .addressing import SlotAddressing
from .block import ffn_with_memory
from .config import UltraMemConfig
from .factors import GradientFactors
from .layer import UltraMemLayer
from .table import MemoryTable

__all__ = [
    "GradientFactors",
    "MemoryTable",
    "SlotAddressing",
    "UltraMemConfig",
    "UltraMemLayer",
    "__version__",
    "checkpoint",
    "factors",
    "ffn_with_memory",
    "init",
    "losses",
    "nvtx",
    "ops",
    "optim",
    "parallel",
    "stats",
    "topology",
]

if _typing.TYPE_CHECKING:
    from . import parallel
else:
    # Imported at first use: torch.distributed takes a while, and not every torch has it.
    def __getattr__(name: str) -> _typing.Any:
        if name == "parallel":
            return _importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# python_ref, profiling, bench and examples are folders of the repository's root, shipped inside
# this package by the wheel. In a checkout they are found where they are.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "python_ref" / "__init__.py").is_file():
    __path__.append(str(_checkout))
