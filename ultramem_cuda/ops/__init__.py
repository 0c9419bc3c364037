"""The operators: public wrappers, with their fake implementations and autograd formulas.

Every function runs on CPU and CUDA, under torch.compile, CUDA-graph capture, activation
checkpointing and autocast, and never synchronises with the host. Accumulation is float32 (float64
for float64, which is offered on the CPU). Empty inputs (T = 0) are legal. Differentiating twice
and vmap raise; forward-mode differentiation (jvp) is not offered, and torch gives zero for it.

Vocabulary: T tokens, D d_model, H heads, n keys per side, Kd key dimension, R Tucker rank, Q
queries per head and side (1, or R), C cores, m kept per axis, M kept in the end, N table rows, Dp
and Dv widths of a pre-value and a value row, E virtual copies of the table.

Errors: RuntimeError (or ValueError where Python decides) naming the operator, the argument, what
it was and what it must be, before any kernel runs. An index out of range raises on the CPU; on
CUDA it contributes zero, or raises with ULTRAMEM_DEBUG=1 in the environment.
"""

from . import _slots  # noqa: F401 (registers what has no public wrapper)
from ._key_balance import key_balance_loss
from ._product_key import product_key_topk
from ._rms_norm import rms_norm
from ._tucker import tucker_filter, tucker_query
from ._value_ffn import value_ffn
from ._value_slots import value_slots

__all__ = [
    "key_balance_loss",
    "product_key_topk",
    "rms_norm",
    "tucker_filter",
    "tucker_query",
    "value_ffn",
    "value_slots",
]
