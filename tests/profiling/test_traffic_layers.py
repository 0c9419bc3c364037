"""The byte model's tensors against kernels that run, real modules, optimizers and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from traffic_walk import Dispatch, Walk, ffn_backward, ffn_forward

from ultramem_cuda import MemoryTable, UltraMemConfig, UltraMemLayer
from ultramem_cuda.examples.lm.layers import MoE, SwiGLU
from ultramem_cuda.profiling import traffic
from ultramem_cuda.profiling.traffic import Bytes, DenseFFN, MemoryLayer, MoEFFN, PKMLayer, Recipe

TOKENS = 23  # no other size of the layers here

CONFIG = UltraMemConfig(
    d_model=24,
    num_layers=2,
    num_keys=20,
    key_dim=6,
    num_slots=500,
    value_dim=8,
    pre_value_dim=4,
    num_heads=2,
    tucker_rank=3,
    topk=5,
)
PKM_CONFIG = UltraMemConfig(
    d_model=24,
    num_layers=2,
    num_keys=20,
    key_dim=6,
    num_slots=500,
    value_dim=8,
    num_heads=3,
    tucker_rank=1,
    num_cores=1,
    topk=5,
    mode="additive",
    score_norm="softmax",
)
FP32 = Recipe(grad_bytes=4)


def fp32(layer: Any) -> Any:
    return dataclasses.replace(layer, parameter_bytes=4, activation_bytes=4)


def moved(layer: traffic.Layer, which: traffic.Pass, tokens: int, **options: Any) -> Bytes:
    return traffic.total(layer.terms(which, tokens, **options))


# ---- kernels that run ----------------------------------------------------------------------------


def test_ffn_against_its_kernels() -> None:
    torch.manual_seed(0)
    module = SwiGLU(24, 40)
    x = torch.randn(TOKENS, 24, requires_grad=True)
    grad_y = torch.randn(TOKENS, 24)
    y = module(x)
    expected = torch.autograd.grad(y, (x, module.gate_up.weight, module.down.weight), grad_y)
    layer = fp32(DenseFFN(24, 40))

    with torch.no_grad():
        walk = Walk(module.parameters())
        saved = ffn_forward(walk, module, x)
        torch.testing.assert_close(saved["y"], y)
        for which in ("inference", "forward"):
            assert moved(layer, which, TOKENS) == Bytes(
                dense=walk.parameter_bytes, activations=walk.activation_bytes
            )
        walk = Walk(module.parameters())
        found = ffn_backward(walk, module, x, saved, grad_y)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert moved(layer, "backward", TOKENS, recipe=FP32) == Bytes(
        dense=walk.parameter_bytes + walk.gradient_bytes, activations=walk.activation_bytes
    )


@pytest.mark.parametrize("tokens", [3, TOKENS])
def test_moe_against_its_kernels(tokens: int) -> None:
    torch.manual_seed(0)
    module = MoE(24, 16, num_experts=12, experts_per_token=2)
    for parameter in (module.gate_up, module.down):
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(tokens, 24, requires_grad=True)
    grad_y = torch.randn(tokens, 24)
    y, _ = module(x)
    weights = (module.router.weight, module.gate_up, module.down)
    expected = torch.autograd.grad(y, (x, *weights), grad_y)
    layer = fp32(MoEFFN(24, 16, 12, 2))
    dispatch = Dispatch(module)

    with torch.no_grad():
        walk = Walk(dispatch.weights)
        saved = dispatch.forward(walk, x)
        torch.testing.assert_close(saved["y"], y)
        touched = len(dispatch.used)
        assert 1 < touched < 12 or tokens > 3
        router = dispatch.router.nbytes
        experts = walk.parameter_bytes - router
        assert moved(layer, "forward", tokens, touched=touched) == Bytes(
            router, experts, experts, walk.activation_bytes
        )
        # Without a backward nobody wants the probabilities.
        assert moved(layer, "inference", tokens, touched=touched) == Bytes(
            router, experts, experts, walk.activation_bytes - saved["probabilities"].nbytes
        )
        walk = Walk(dispatch.weights)
        found = dispatch.backward(walk, x, saved, grad_y)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert walk.parameter_bytes == router + experts
    assert moved(layer, "backward", tokens, touched=touched, recipe=FP32) == Bytes(
        router + walk.gradient_bytes, experts, experts, walk.activation_bytes
    )


class Operators(TorchDispatchMode):
    """Bytes of tokens' tensors that the operators of this package and matrix products take and
    give, by operator."""

    COUNTED = ("ultramem.", "aten.mm.", "aten._softmax")

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[str] = Counter()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(self.COUNTED):
            self.names.append(str(func))
            name = str(func).split(".")[1].strip("_").split("_bwd")[0].split("_backward")[0]
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            for tensor in (*args, *outputs):
                if isinstance(tensor, Tensor) and TOKENS in tensor.shape:
                    self.nbytes[name] += tensor.nbytes
        return result


def activations_by_operator(layer: traffic.Layer, which: traffic.Pass) -> Counter[str]:
    """Those of the projections, which are matrix products, together."""
    found: Counter[str] = Counter()
    for term in layer.terms(which, TOKENS):
        if term.part == "activations":
            name = "mm" if term.operator in ("pre_proj", "value_proj") else term.operator
            found[name] += int(term.bytes().activations)
    return found


@pytest.mark.parametrize("config", [CONFIG, PKM_CONFIG], ids=["memory", "pkm"])
def test_memory_layer_against_its_operators(config: UltraMemConfig) -> None:
    """Operators show what lies between them; what lies between their kernels is added here."""
    torch.manual_seed(0)
    module = UltraMemLayer(config, 0)
    table = MemoryTable.from_config(config, grad_mode="deferred")
    kind = PKMLayer if config.mode == "additive" else MemoryLayer
    layer = fp32(kind(config))
    x = torch.randn(TOKENS, config.d_model, requires_grad=True)
    heads, rank, kept = config.num_heads, config.tucker_rank, config.kept_per_axis
    axis_indices = TOKENS * heads * 2 * kept * 4
    axis_scores = axis_indices * rank
    projection = TOKENS * module.query_proj.weight.shape[0] * 4

    with Operators() as forward:
        y = module(x, table)
    assert any("value_ffn" in name for name in forward.names)
    # The norm reads the projection, the grid what the axes kept.
    expected = forward.nbytes
    expected += Counter(tucker_query=projection, product_key_topk=axis_indices + axis_scores)
    assert activations_by_operator(layer, "forward") == expected

    with Operators() as backward:
        y.backward(torch.randn_like(y))
    assert any("value_ffn_bwd_deferred" in name for name in backward.names)
    # Gradients of scores of kept keys, then those of the projection, are made and read twice.
    expected = backward.nbytes
    expected += Counter(tucker_query=3 * projection, product_key_topk=3 * axis_scores)
    if config.pre_value_dim:
        # The second product with a result for grad_x reads the first one's.
        expected["mm"] += x.nbytes
    assert table.factors is not None
    expected["value_ffn"] += TOKENS * table.factors.bytes_per_token
    assert activations_by_operator(layer, "backward") == expected

    # In inference the operators still write what only a backward reads.
    unused = TOKENS * config.slots_per_token * (2 + (4 if config.pre_value_dim else 0))
    assert moved(layer, "inference", TOKENS).activations == (
        moved(layer, "forward", TOKENS).activations - unused
    )


@pytest.mark.parametrize("which", ["inference", "forward", "backward"])
def test_parameters_are_read_by_their_operators(which: traffic.Pass) -> None:
    module = UltraMemLayer(CONFIG, 0, dtype=torch.bfloat16)
    expected = {
        name.removesuffix(".weight"): parameter.nbytes
        for name, parameter in module.named_parameters()
    }
    keys = expected.pop("keys")
    expected["cores and key_norm"] = expected.pop("cores") + expected.pop("key_norm")
    operators: dict[str, Counter[str]] = {}
    for term in MemoryLayer(CONFIG).terms(which, TOKENS):
        assert term.operator
        if term.part not in ("activations", "rows") and not term.name.startswith("grad"):
            operators.setdefault(term.operator, Counter())[term.name] += int(term.bytes().dense)
    query = {name: expected.pop(name) for name in ("query_proj", "query_norm")}
    assert operators.pop("tucker_query") == query
    read = {"normalized keys": keys, "cores and key_norm": expected.pop("cores and key_norm")}
    assert operators.pop("product_key_topk") == read
    norm = {"inference": {}, "forward": {"keys": keys, "normalized keys": keys}}
    assert operators.pop("rms_norm", Counter()) == norm.get(which, {"keys": keys})
    assert operators == {name: {name: nbytes} for name, nbytes in expected.items()}


# ---- parameters ----------------------------------------------------------------------------------


def test_parameters_are_those_of_modules() -> None:
    ffn = SwiGLU(24, 40)
    assert DenseFFN(24, 40).active_parameters() == sum(p.numel() for p in ffn.parameters())
    moe = MoE(24, 16, 12, 2)
    model = MoEFFN(24, 16, 12, 2)
    assert model.active_parameters() == moe.active_parameters()
    assert model.total_parameters() == sum(p.numel() for p in moe.parameters())
    for config, kind in ((CONFIG, MemoryLayer), (PKM_CONFIG, PKMLayer)):
        layer = UltraMemLayer(config, 0)
        table = MemoryTable.from_config(config)
        own = sum(p.numel() for p in layer.parameters())
        rows = sum(p.shape[1] for p in table.parameters())
        assert kind(config).active_parameters() == own + config.slots_per_token * rows
        shared = sum(p.numel() for p in table.parameters()) // config.num_layers
        assert kind(config).total_parameters() == own + shared
        read = kind(config, parameter_bytes=4, activation_bytes=4).traffic("decode", 7)
        assert read.dense == sum(p.nbytes for p in layer.parameters())


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_rows_against_a_walk_over_them(element_bytes: int) -> None:
    layer = MemoryLayer(CONFIG, element_bytes, element_bytes)
    generator = np.random.default_rng(1)
    gathered, rows = 0, set()
    for _ in range(7):
        for slot in generator.choice(400, 10, replace=False):
            gathered += (4 + 8) * element_bytes
            rows.add(int(slot))
    read = layer.traffic("decode", 7, touched=len(rows))
    assert read.gathered == gathered
    assert read.distinct == len(rows) * (4 + 8) * element_bytes
    assert read.upper == read.dense + gathered + read.activations
    assert read.lower < read.upper
    # The same rows again in the backward pass.
    assert layer.traffic("training", 7, touched=len(rows)).gathered == 2 * gathered


def test_touched_rows_against_simulation() -> None:
    layer = MemoryLayer(dataclasses.replace(CONFIG, num_keys=30, num_slots=900, topk=16))
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(200):
        rows = [generator.choice(900, 32, replace=False) for _ in range(20)]
        counts.append(len(np.unique(rows)))
    assert layer.touched(20) == pytest.approx(np.mean(counts), rel=0.01)


def test_routing_replaces_uniform_choices() -> None:
    skewed = dataclasses.replace(MemoryLayer(CONFIG), routing=traffic.Routing.zipf(400, 10))
    counted = MemoryLayer(CONFIG).traffic("training", 50, touched=skewed.touched(50))
    assert skewed.traffic("training", 50) == counted
    assert counted.lower < MemoryLayer(CONFIG).traffic("training", 50).lower
    assert counted.upper == MemoryLayer(CONFIG).traffic("training", 50).upper


# ---- docstrings ----------------------------------------------------------------------------------

E = 2  # bytes of an activation here


def documented(layer: type, symbols: dict[str, int]) -> dict[str, dict[str, tuple[int, str]]]:
    """Passes -> tensors -> (bytes of a token, "reads+writes"), as the class's docstring has it."""
    lines = (inspect.getdoc(layer) or "").splitlines()
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"[= ]+", line.strip() or "-")]
    starts = [match.start() for match in re.finditer("=+", lines[rules[0]])]
    ends = [*starts[1:], None]
    rows = [
        [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        for line in lines[rules[1] + 1 : rules[2]]
    ]
    passes = lines[rules[0] + 1].split()[3:]
    found: dict[str, dict[str, tuple[int, str]]] = {which: {} for which in passes}
    for name, elements, size, *times in rows:
        nbytes = eval(elements, {}, symbols) * (E if size == "e" else int(size))
        for which, time in zip(passes, times, strict=True):
            if time:
                found[which][name] = (nbytes, time)
    return found


MOE = MoEFFN(24, 16, 12, 2)


@pytest.mark.parametrize(
    ("layer", "symbols"),
    [
        (DenseFFN(24, 40), {"D": 24, "I": 40}),
        (MOE, {"D": 24, "I": 16, "X": 12, "k": 2}),
        (
            MemoryLayer(CONFIG),
            {"D": 24, "P": 72, "H": 2, "R": 3, "m": 5, "S": 10, "C": 2, "Dp": 4, "Dv": 8, "G": 1},
        ),
    ],
)
def test_docstrings_hold_what_is_counted(layer: traffic.Layer, symbols: dict[str, int]) -> None:
    for which, tensors in documented(type(layer), symbols).items():
        # Of a tensor there is a term for each operator that goes through it.
        sizes: dict[str, set[float]] = {}
        times: dict[str, tuple[float, float]] = {}
        for term in layer.terms(which, 7):  # type: ignore[arg-type]
            if term.part == "activations" and "factors" not in term.name:
                sizes.setdefault(term.name, set()).add(term.nbytes / 7)
                reads, writes = times.get(term.name, (0, 0))
                times[term.name] = reads + term.reads, writes + term.writes
        counted = {
            name: (*size, f"{times[name][0]:g}+{times[name][1]:g}") for name, size in sizes.items()
        }
        assert counted == tensors


# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ffn", "moe"])
def test_flops_of_feed_forward_layers_against_torchs_count(kind: str) -> None:
    torch.manual_seed(0)
    module: nn.Module = SwiGLU(24, 40)
    layer: traffic.Layer = DenseFFN(24, 40)
    if kind == "moe":
        module, layer = MoE(24, 16, 12, 2), MOE
    x = torch.randn(TOKENS, 24, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        result = module(x)
    y = result[0] if isinstance(result, tuple) else result
    assert layer.flops("decode", TOKENS) == forward.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    assert layer.flops("training", TOKENS) == both
    assert layer.flops("optimizer", TOKENS) == 0


def test_flops_of_a_memory_layer_against_torchs_count() -> None:
    c = CONFIG
    x = torch.randn(TOKENS, c.d_model)
    rows = torch.randn(TOKENS, c.slots_per_token, c.value_dim + c.pre_value_dim)
    planes = 2 * c.num_heads * c.tucker_rank
    query = torch.randn(planes, TOKENS, c.key_dim)
    with FlopCounterMode(display=False) as projections:
        F.linear(x, torch.randn(planes * c.key_dim, c.d_model))
        F.linear(x, torch.randn(c.pre_value_dim, c.d_model))
        F.linear(torch.randn(TOKENS, c.value_dim), torch.randn(c.d_model, c.value_dim))
    with FlopCounterMode(display=False) as scores:
        query @ torch.randn(planes, c.key_dim, c.num_keys)
    with FlopCounterMode(display=False) as kept:  # by each token, of keys of its own
        torch.randn(planes * TOKENS, 1, c.kept_per_axis) @ torch.randn(
            planes * TOKENS, c.kept_per_axis, c.key_dim
        )
    with FlopCounterMode(display=False) as gathered:
        rows @ torch.randn(TOKENS, rows.shape[2], 1)
    fixed, all_keys, some_keys, read = (
        counter.get_total_flops() for counter in (projections, scores, kept, gathered)
    )
    layer = MemoryLayer(c)
    assert layer.pass_flops("inference", TOKENS) == fixed + all_keys + read
    assert layer.pass_flops("backward", TOKENS) == 2 * fixed + 2 * some_keys + read
    assert layer.flops("optimizer", TOKENS) == read
    into_main_grad = Recipe(table_gradient="main_grad")
    assert layer.pass_flops("backward", TOKENS, into_main_grad) == (
        2 * fixed + 2 * some_keys + 2 * read
    )
    assert layer.flops("optimizer", TOKENS, into_main_grad) == 0


# ---- sums and errors -----------------------------------------------------------------------------


def test_layers_add_up_and_their_outputs_are_added() -> None:
    ffn, memory = DenseFFN(24, 40), MemoryLayer(CONFIG)
    block = ffn + memory
    assert (block + ffn).parts == (ffn, memory, ffn)
    for phase in ("decode", "training", "optimizer"):
        for tokens in (1, 5):
            parts = ffn.traffic(phase, tokens) + memory.traffic(phase, tokens)
            count = block.traffic(phase, tokens)
            assert count.parameters == parts.parameters
            sums = {"decode": 1, "training": 2, "optimizer": 0}[phase] * 3 * 24 * 2 * tokens
            assert count.activations == parts.activations + sums
            flops = ffn.flops(phase, tokens) + memory.flops(phase, tokens)
            assert block.flops(phase, tokens) == flops
    assert block.traffic("decode", 5, touched=7).distinct == 7 * 12 * 2
    assert block.traffic("decode", 0) == Bytes()
    assert block.active_parameters() == ffn.active_parameters() + memory.active_parameters()
    assert block.total_parameters() == ffn.total_parameters() + memory.total_parameters()


def test_wrong_layers_and_counts() -> None:
    for kind, sizes in ((DenseFFN, (24, -1)), (DenseFFN, (0, 4)), (MoEFFN, (24, 16, 0, 0))):
        with pytest.raises(ValueError, match="must be at least 1"):
            kind(*sizes)
    with pytest.raises(ValueError, match="at most num_experts"):
        MoEFFN(24, 16, 4, 5)
    with pytest.raises(ValueError, match="parameter_bytes must be 2 or 4"):
        DenseFFN(24, 40, parameter_bytes=3)
    with pytest.raises(ValueError, match="one width"):
        DenseFFN(24, 40) + DenseFFN(16, 40)
    with pytest.raises(ValueError, match="must have mode 'additive'"):
        PKMLayer(CONFIG)
    with pytest.raises(ValueError, match="no members"):
        DenseFFN(24, 40).traffic("decode", 3, touched=2)
    with pytest.raises(ValueError, match=r"in \[0, 6\] for 3 tokens"):
        MOE.traffic("decode", 3, touched=7)
    with pytest.raises(ValueError, match="there are 2"):
        (MOE + MemoryLayer(CONFIG)).traffic("decode", 3, touched=2)
    with pytest.raises(ValueError, match="not be negative"):
        MOE.traffic("decode", -1)
