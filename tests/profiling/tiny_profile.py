"""A preset of tiny layers, and instruments that measure it on the CPU against a simulated GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from nvml_stand_in import SimulatedGpu

from ultramem_cuda import UltraMemConfig
from ultramem_cuda.profiling.instruments import Instruments, Windows
from ultramem_cuda.profiling.presets import Case, ProfilePreset
from ultramem_cuda.profiling.sampling import Baseline, Measurement, Sampler
from ultramem_cuda.profiling.traffic import DenseFFN, MemoryLayer, MoEFFN

D, INNER = 32, 24
LAYERS = 3
EXPERTS, EXPERTS_PER_TOKEN = 6, 2
CONFIG = UltraMemConfig(
    d_model=D,
    num_layers=LAYERS,
    num_keys=12,
    key_dim=8,
    num_slots=500,
    value_dim=16,
    pre_value_dim=8,
    topk=6,
)
PASS_SECONDS, PASS_BYTES, PASS_WATTS = 2e-3, 3e9, 400.0


def tiny_preset(name: str = "1B-7B") -> ProfilePreset:
    ffn, memory = DenseFFN(D, INNER), MemoryLayer(CONFIG)
    moe = MoEFFN(D, 16, EXPERTS, EXPERTS_PER_TOKEN)
    cases = (
        Case("memory", "memory layer", "memory", memory, "tiny"),
        Case("ffn", "FFN", "ffn", ffn, "tiny"),
        Case("block", "FFN + memory layer", "block", ffn + memory, "tiny"),
        Case("moe", "MoE", "moe", moe, "tiny"),
        Case("moe-fine", "fine-grained MoE", "moe", moe, "tiny"),
    )
    comparisons = (("block", "moe"), ("memory", "moe-fine"))
    return ProfilePreset(CONFIG, name, cases, comparisons)


def record_in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """What a CUDA graph does, call by call."""

    def run() -> None:
        for call in calls:
            call()

    return run


class SimulatedSampler:
    """Runs what is measured once; the window is that of a pass of the simulated GPU."""

    def __init__(self, sampler: Sampler, gpu: SimulatedGpu) -> None:
        self.sampler, self.gpu = sampler, gpu
        self.windows = 0

    def measure(self, run: Callable[[], object], baseline: Baseline) -> Measurement:
        run()
        self.windows += 1
        simulated = self.gpu.run(PASS_SECONDS, PASS_BYTES, PASS_WATTS)
        return self.sampler.measure(simulated, baseline)


def cpu_instruments(windows: Windows | None = None) -> Instruments:
    return Instruments(
        device=torch.device("cpu"),
        dtype=torch.float32,
        compiled=False,
        new_recorder=lambda: record_in_turn,
        windows=windows,
        weights_bytes=1 << 30,
    )
