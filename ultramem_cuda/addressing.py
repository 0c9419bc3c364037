"""From product-key index to table row: shuffle, window and implicit value expansion."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64: torch has no uint64 arithmetic, and int64 wraps the same
    way."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix64(z: int) -> int:
    """The splitmix64 finaliser on one Python integer."""
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK64
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK64
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: an arithmetic shift with the copies of the sign bit masked away."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix64_tensor(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _unsigned_mod(z: Tensor, n: int) -> Tensor:
    """z mod n with z read as uint64, from its two halves; n < 2^31 keeps every product below
    2^63."""
    high = _shift_right(z, 32) % n
    low = (z & 0xFFFFFFFF) % n
    return (high * ((1 << 32) % n) + low) % n


@dataclasses.dataclass(frozen=True, eq=False)
class SlotAddressing:
    """Maps a layer's virtual index v in [0, expand * window) to a row of the table and a value
    group.

    ::

        v' = shuffle(v);  slot = (v' % window + offset) % num_slots;  group = v' // window

    Args:
        num_slots: rows of the table, N.
        window: rows that the layer sees, 0 < window <= num_slots.
        offset: first row of the window, in [0, num_slots).
        expand: virtual copies of the window, E (implicit value expansion, UltraMem section 3.4).
        shuffle: None; ``"feistel"``, a seeded bijection that needs no table and expand * window to
            be a square n*n; or an int64 tensor [expand * window] that holds a permutation, as the
            released checkpoints have it. The tensor is used, not copied: do not write to it
            afterwards.
        seed: of the "feistel" shuffle, in [0, 2^63).

    ``num_keys`` is n for "feistel" and 0 otherwise. Instances compare and hash by value (tensors by
    device and content).

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be. That a tensor
            is a permutation is checked here, once (on CUDA this synchronises), except on the meta
            device.
    """

    num_slots: int
    window: int
    offset: int = 0
    expand: int = 1
    shuffle: str | Tensor | None = None
    seed: int = 0
    num_keys: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        for name in ("num_slots", "window", "offset", "expand", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: must be an int, got {type(value).__name__}")
        if not 0 < self.num_slots < 1 << 63:
            raise ValueError(f"num_slots: must be in [1, 2^63), got {self.num_slots}")
        if not 0 < self.window <= self.num_slots:
            raise ValueError(
                f"window: must be in [1, num_slots = {self.num_slots}], got {self.window}"
            )
        if not 0 <= self.offset < self.num_slots:
            raise ValueError(
                f"offset: must be in [0, num_slots = {self.num_slots}), got {self.offset}"
            )
        if self.expand < 1:
            raise ValueError(f"expand: must be at least 1, got {self.expand}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed: must be in [0, 2^63), got {self.seed}")
        if isinstance(self.shuffle, Tensor):
            _check_permutation(self.shuffle, self.num_virtual)
        elif self.shuffle == "feistel":
            num_keys = math.isqrt(self.num_virtual)
            if num_keys**2 != self.num_virtual or num_keys >= 1 << 31:
                raise ValueError(
                    "expand * window: must be the square of a number below 2^31 for the feistel "
                    f"shuffle, got {self.expand} * {self.window} = {self.num_virtual}"
                )
            object.__setattr__(self, "num_keys", num_keys)
        elif self.shuffle is not None:
            raise ValueError(
                f"shuffle: must be None, 'feistel' or an int64 tensor, got {self.shuffle!r}"
            )

    @property
    def num_virtual(self) -> int:
        """Virtual indices of the layer, expand * window."""
        return self.expand * self.window

    def placement(self, device: torch.device | str | None = None) -> Tensor:
        """What tells layers of one configuration apart, as ``ops.value_slots`` takes it: int64 [2]
        on ``device``, the offset and the mixed seed."""
        numbers = [self.offset, _signed(_mix64(self.seed))]
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    def slots(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and groups of virtual indices, bit for bit as the kernels compute them.

        Args:
            indices: integer tensor of any shape, values in [0, expand * window), which is not
                checked.

        Returns:
            slot in [0, num_slots) and group in [0, expand), int64 tensors of the shape of
            ``indices``.
        """
        v = indices.to(torch.int64)
        if isinstance(self.shuffle, Tensor):
            v = self.shuffle.to(v.device)[v]
        elif self.shuffle == "feistel":
            v = self._feistel(v)
        return (v % self.window + self.offset) % self.num_slots, v // self.window

    def to(self, device: torch.device | str) -> SlotAddressing:
        """The same addressing with a tensor shuffle on ``device``; self where there is nothing to
        move."""
        if not isinstance(self.shuffle, Tensor) or self.shuffle.device == torch.device(device):
            return self
        return self._with_permutation(self.shuffle.to(device))

    def _with_permutation(self, permutation: Tensor) -> SlotAddressing:
        """A copy that holds ``permutation``, known to be one: its content is not checked again."""
        other = object.__new__(SlotAddressing)
        other.__dict__.update(self.__dict__, shuffle=permutation)
        return other

    def _feistel(self, v: Tensor) -> Tensor:
        n = self.num_keys
        row, col = v // n, v % n
        row = (row + self._hash(0, col)) % n
        col = (col + self._hash(1, row)) % n
        row = (row + self._hash(2, col)) % n
        col = (col + self._hash(3, row)) % n
        return row * n + col

    def _hash(self, k: int, a: Tensor) -> Tensor:
        """h(k, a) = mix64(mix64(seed) + golden * (4a + k + 1)) mod n in uint64 arithmetic."""
        z = (a * 4 + (k + 1)) * _signed(_GOLDEN) + _signed(_mix64(self.seed))
        return _unsigned_mod(_mix64_tensor(z), self.num_keys)

    def _plain(self) -> tuple[Any, ...]:
        shuffle = "tensor" if isinstance(self.shuffle, Tensor) else self.shuffle
        return self.num_slots, self.window, self.offset, self.expand, shuffle, self.seed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SlotAddressing):
            return NotImplemented
        if self._plain() != other._plain():
            return False
        if self.shuffle is other.shuffle or not isinstance(self.shuffle, Tensor):
            return True
        theirs = cast(Tensor, other.shuffle)
        return self.shuffle.device == theirs.device and torch.equal(self.shuffle, theirs)

    def __hash__(self) -> int:
        return hash(self._plain())


def _check_permutation(permutation: Tensor, size: int) -> None:
    if permutation.dtype != torch.int64:
        raise TypeError(f"shuffle: must have dtype torch.int64, got {permutation.dtype}")
    if tuple(permutation.shape) != (size,):
        raise ValueError(
            f"shuffle: must have shape [expand * window] = [{size}], got {list(permutation.shape)}"
        )
    if permutation.is_meta:
        return
    in_range = bool(((permutation >= 0) & (permutation < size)).all())
    if not in_range or not bool((torch.bincount(permutation, minlength=size) == 1).all()):
        raise ValueError(
            f"shuffle: must be a permutation of 0 .. {size - 1}, but entries repeat or are out of "
            "range"
        )
