"""Checkpoints: of training runs, for other libraries, and those of the published code.

:func:`save` and :func:`load` keep a run, sharded or not, so that it goes on with another number of
processes; :func:`latest` finds where it stopped. :func:`export_safetensors` and
:func:`load_safetensors` exchange weights with Hugging Face's libraries. :func:`load_release` takes
the state dict of the code published with UltraMemV2.
"""

from ._release import ReleasedMemory, load_release
from ._safetensors import export_safetensors, load_safetensors
from ._sharded import Checkpoint, latest, load, read_extra, save

__all__ = [
    "Checkpoint",
    "ReleasedMemory",
    "export_safetensors",
    "latest",
    "load",
    "load_release",
    "load_safetensors",
    "read_extra",
    "save",
]
