"""Times, bytes and energy of a preset's subjects: decode and training, point by point."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import timing
from .contenders import (
    Contender,
    NotMeasurable,
    make_contender,
    package_case,
    packaged_contender,
)
from .draft import RECIPE, Draft, Key
from .instruments import Instruments, Recorder, Run, free_memory
from .moe_packages import PackagedMoE
from .presets import Case, ProfilePreset
from .record import Phase
from .settings import Settings
from .timing import Candidate

__all__ = ["PACKAGE_TOKENS", "GroupProfiler", "training_passes"]

# Where the MoE of installed packages is timed: few, in the middle, many.
PACKAGE_TOKENS = (1, 64, 4096)
DECODE_CALLS = 20
# Layers that training rotates over. Their gradients take as much memory again.
TRAINING_LAYERS = 4
# A graph holds so many tokens at least, so that it takes milliseconds.
TRAINING_TOKENS_OF_A_GRAPH = 8192
_ROTATED_BYTES = 100e6
_NO_ROOM = "does not fit in the GPU's memory"


def decode_calls(num_layers: int) -> int:
    """The least multiple of the layers that is at least DECODE_CALLS."""
    return num_layers * math.ceil(DECODE_CALLS / num_layers)


def training_passes(tokens: int) -> int:
    """Of one graph."""
    return math.ceil(TRAINING_TOKENS_OF_A_GRAPH / tokens)


@dataclass(frozen=True)
class _Recorded:
    """One run of several calls."""

    replay: Run
    clear: Run
    """To be called between two replays: factors of the one before must be gone, and a graph cannot
    hold that."""
    calls: int
    touched: float | None
    """Distinct experts or rows of a call, on average; None for a layer without either."""

    def run(self) -> None:
        self.clear()
        self.replay()


class GroupProfiler:
    """Measures one group of a preset's subjects.

    Attributes:
        first_call_seconds: spent in first calls so far, in which torch compiles.
    """

    def __init__(
        self,
        draft: Draft,
        preset: ProfilePreset,
        cases: Sequence[Case],
        instruments: Instruments,
        settings: Settings,
        packages: Sequence[PackagedMoE] = (),
    ) -> None:
        self.first_call_seconds = 0.0
        self._draft = draft
        self._preset = preset
        self._instruments = instruments
        self._settings = settings
        torch.manual_seed(settings.seed)
        self._contenders = [c for case in cases if (c := self._make(case)) is not None]
        self._packaged = self._make_packaged(packages)

    def _make(self, case: Case) -> Contender | None:
        try:
            contender = make_contender(case, self._preset, self._instruments)
        except torch.OutOfMemoryError:
            self._leave_out(case.name, _NO_ROOM)
        except NotMeasurable as error:
            self._leave_out(case.name, str(error))
        else:
            self._check_rotation(contender)
            return contender
        free_memory(self._instruments.device, collect=True)
        return None

    def _leave_out(self, subject: str, reason: str) -> None:
        self._draft.note(f"{self._preset.name}: {subject} was not measured: {reason}")

    def _check_rotation(self, contender: Contender) -> None:
        if contender.dense_bytes < _ROTATED_BYTES:
            self._draft.note(
                f"{self._preset.name}: what one token reads of all {contender.num_layers} layers "
                f"of {contender.name} is {contender.dense_bytes / 1e6:.0f} MB: at few tokens a "
                "large cache holds a part of it"
            )

    def _make_packaged(self, packages: Sequence[PackagedMoE]) -> list[Contender]:
        found = []
        ours = [contender for contender in self._contenders if contender.name == "moe"]
        for package in packages if ours else ():
            case = package_case(package, self._preset["moe"])
            try:
                found.append(packaged_contender(package, case, ours[0], self._instruments.device))
            except torch.OutOfMemoryError:
                self._leave_out(case.name, _NO_ROOM)
            except NotMeasurable as error:
                self._leave_out(case.name, str(error))
        return found

    def start(self, phase: Phase) -> None:
        """To be called once before a phase's points; "decode" first."""
        if phase == "decode":
            for contender in [*self._contenders, *self._packaged]:
                contender.runnable.start_decode()
            return
        self._packaged.clear()
        for contender in self._contenders:
            contender.keep_layers(TRAINING_LAYERS)
        free_memory(self._instruments.device)
        grid = self._settings.training_tokens
        # Twice: as many calls as a graph holds, or two of them, come before it is captured.
        room = 2 * max(training_passes(tokens) * tokens for tokens in grid)
        for contender in list(self._contenders):
            try:
                contender.runnable.start_training(room)
            except torch.OutOfMemoryError:
                self._contenders.remove(contender)
                self._leave_out(f"training of {contender.name}", _NO_ROOM)
                del contender
                free_memory(self._instruments.device, collect=True)

    def measure(self, phase: Phase, tokens: int) -> None:
        """One number of tokens: all subjects in turns, then their windows one by one."""
        recorder = self._instruments.new_recorder()
        recorded: dict[str, _Recorded] = {}
        packaged = self._packaged if tokens in PACKAGE_TOKENS else []
        for contender in [*self._contenders, *packaged]:
            one = self._record(contender, phase, tokens, recorder)
            if one is not None:
                recorded[contender.name] = one
                self._count(contender, phase, tokens, one)
        timings = timing.measure(
            {name: Candidate(one.replay, one.clear) for name, one in recorded.items()},
            self._instruments.device,
            warmup=1,
            repeats=self._settings.repeats,
            cold=False,
        )
        for name, one in recorded.items():
            key = self._key(name, phase, tokens)
            if name not in timings:
                self._draft.update(key, note=f"It {_NO_ROOM}.")
                continue
            self._draft.update(key, timing=timings[name].of_one(one.calls))
            if self._settings.wants_window(phase, name, tokens):
                self._sample(key, one)
        recorded.clear()
        free_memory(self._instruments.device)

    def _key(self, subject: str, phase: Phase, tokens: int) -> Key:
        return self._preset.name, subject, phase, tokens

    def _sample(self, key: Key, recorded: _Recorded) -> None:
        if self._instruments.windows is None:
            return
        found = self._instruments.windows.measure(recorded.run)
        notes = " ".join(f"{note}." for note in found.notes)
        self._draft.update(key, sampled=found.sampled.of_one(recorded.calls), note=notes)

    def _count(self, contender: Contender, phase: Phase, tokens: int, recorded: _Recorded) -> None:
        if recorded.touched is None:
            return
        counted = contender.layer.traffic(phase, tokens, touched=recorded.touched, recipe=RECIPE)
        self._draft.update(self._key(contender.name, phase, tokens), counted=counted)

    def _record(
        self, contender: Contender, phase: Phase, tokens: int, recorder: Recorder
    ) -> _Recorded | None:
        make = self._decode_calls if phase == "decode" else self._training_calls
        recorded = None
        try:
            inputs, calls = make(contender, tokens)
            self._first_calls(contender, calls)
            recorded = _Recorded(
                recorder(calls),
                contender.runnable.clear,
                len(calls),
                self._touched(contender, inputs),
            )
        except torch.OutOfMemoryError:
            self._draft.update(self._key(contender.name, phase, tokens), note=f"It {_NO_ROOM}.")
        contender.runnable.clear()
        # What first calls leave in torch's cache would be missing where the graphs live.
        free_memory(self._instruments.device, collect=recorded is None)
        return recorded

    def _decode_calls(self, contender: Contender, tokens: int) -> tuple[list[Tensor], list[Run]]:
        inputs = self._inputs(contender, tokens, decode_calls(contender.num_layers))
        forward, num_layers = contender.runnable.forward, contender.num_layers
        return inputs, [functools.partial(forward, i % num_layers, x) for i, x in enumerate(inputs)]

    def _training_calls(self, contender: Contender, tokens: int) -> tuple[list[Tensor], list[Run]]:
        passes = training_passes(tokens)
        *inputs, grad_output = self._inputs(contender, tokens, passes + 1)
        train, num_layers = contender.runnable.train, contender.num_layers
        return inputs, [
            functools.partial(train, i % num_layers, x, grad_output) for i, x in enumerate(inputs)
        ]

    def _inputs(self, contender: Contender, tokens: int, count: int) -> list[Tensor]:
        """The same for all subjects, as far as they use as many."""
        device, dtype = self._instruments.device, self._instruments.dtype
        generator = torch.Generator(device).manual_seed(self._settings.seed)
        width = self._preset.config.d_model
        return [
            torch.randn(tokens, width, generator=generator, dtype=dtype, device=device)
            for _ in range(count)
        ]

    def _first_calls(self, contender: Contender, calls: Sequence[Run]) -> None:
        """One of each layer: torch compiles, and eval mode fills caches that a capture cannot."""
        started = time.perf_counter()
        for call in calls[: contender.num_layers]:
            call()
            contender.runnable.clear()
        if self._instruments.device.type == "cuda":
            torch.cuda.synchronize(self._instruments.device)
        self.first_call_seconds += time.perf_counter() - started

    def _touched(self, contender: Contender, inputs: Sequence[Tensor]) -> float | None:
        """Of the inputs that the run goes through, at the layers that they go through."""
        counts = [
            contender.runnable.touched(i % contender.num_layers, x) for i, x in enumerate(inputs)
        ]
        return sum(counts) / len(counts) if any(counts) else None
