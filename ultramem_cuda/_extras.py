"""Packages that parts of ultramem_cuda use and its operators, modules and optimizers do not.

torch and NumPy are all that ``import ultramem_cuda`` imports. Whatever needs another package asks
for it here, when it is used, so that one sentence says everywhere what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import NamedTuple


class Extra(NamedTuple):
    """An optional package; pyproject.toml has an extra of that name.

    Attributes:
        name: of the extra, as in ``pip install "ultramem_cuda[name]"``.
        module: what is imported.
        distribution: what pip installs.
        gives: what ultramem_cuda does with it.
    """

    name: str
    module: str
    distribution: str
    gives: str

    def is_installed(self) -> bool:
        """Whether the package can be found; imports nothing."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ValueError:  # a module without a spec, put into sys.modules by someone
            return True

    def pip_command(self) -> str:
        """What installs it."""
        return f'pip install "ultramem_cuda[{self.name}]"'


EXTRAS = (
    Extra("profiling", "pynvml", "nvidia-ml-py", "energy, bytes and clocks in `ultramem profile`"),
    Extra("transformers", "transformers", "transformers", "memory in models of Hugging Face"),
    Extra("safetensors", "safetensors", "safetensors", "weights as safetensors files"),
    Extra("figures", "matplotlib", "matplotlib", "figures of `python -m bench.plot_retrieval`"),
)


def require(module: str, *, extra: str) -> ModuleType:
    """Imports an optional package.

    A function that needs the package calls this first and may then import from it as usual. Where
    the modules of a whole subpackage import it at their heads, the subpackage's ``__init__`` calls
    this before it imports them.

    Args:
        module: the package's top-level module, e.g. "transformers".
        extra: the extra of EXTRAS that installs it.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: it is not installed; says what it is for and how to install it.
        ImportError: it is installed and fails to import; the error is its own.
    """
    (found,) = (item for item in EXTRAS if (item.module, item.name) == (module, extra))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Not one of the modules that the package itself imports.
        if error.name != module:
            raise
        raise ModuleNotFoundError(
            f"{found.distribution} is not installed; it gives {found.gives}: {found.pip_command()}",
            name=module,
        ) from error
