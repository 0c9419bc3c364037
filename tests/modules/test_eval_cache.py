"""The layer's cache of normalised keys and filter: used in eval mode, and never stale."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from module_cases import PKM, layer_and_table, tokens
from torch import nn

import ultramem_cuda as um
from ultramem_cuda import _retrieval_cache


@pytest.fixture
def key_norms(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes of the keys that were normalised ahead of scoring, one entry a call."""
    calls: list[torch.dtype] = []
    rms_norm = um.ops.rms_norm

    def counted(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        if x.dim() == 5 and torch.is_inference_mode_enabled() is False:
            calls.append(x.dtype)
        return rms_norm(x, weight, eps=eps)

    import ultramem_cuda.layer as layer_module

    class CountedOps:
        def __getattr__(self, name: str) -> object:
            return counted if name == "rms_norm" else getattr(um.ops, name)

    monkeypatch.setattr(layer_module, "ops", CountedOps())
    return calls


def uncached(layer: um.UltraMemLayer, x: torch.Tensor, table: um.MemoryTable) -> torch.Tensor:
    """What the layer computes with gradients on, where it does not use the cache."""
    with torch.enable_grad():
        return layer(x, table).detach()


def cached(layer: um.UltraMemLayer, x: torch.Tensor, table: um.MemoryTable) -> torch.Tensor:
    with torch.no_grad():
        return layer(x, table)


@pytest.mark.parametrize("overrides", [{}, PKM, {"num_heads": 2, "query_per_rank": False}])
def test_is_used_and_changes_nothing(
    overrides: dict[str, object], key_norms: list[torch.dtype]
) -> None:
    layer, table = layer_and_table(**overrides)
    x = tokens(8, 24)
    layer.eval()
    expected = uncached(layer, x, table)
    assert key_norms == []
    for _ in range(3):
        assert torch.equal(cached(layer, x, table), expected)
    assert key_norms == [torch.float32]
    layer.train()
    assert torch.equal(cached(layer, x, table), expected)
    assert key_norms == [torch.float32]


def test_follows_autocast(key_norms: list[torch.dtype]) -> None:
    layer, table = layer_and_table()
    x = tokens(8, 24)
    layer.eval()
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cached(layer, x, table), uncached(layer, x, table))
        assert torch.equal(cached(layer, x, table), uncached(layer, x, table))
    assert key_norms == [torch.bfloat16, torch.float32]


def scale_in_place(layer: um.UltraMemLayer) -> None:
    with torch.no_grad():
        layer.keys.mul_(torch.linspace(0.5, 2.0, 6))


def scale_gain(layer: um.UltraMemLayer) -> None:
    with torch.no_grad():
        layer.key_norm.mul_(1.5)


def change_core(layer: um.UltraMemLayer) -> None:
    assert layer.cores is not None
    with torch.no_grad():
        layer.cores[0, 0, 0, 1] += 2.0


def optimizer_step(layer: um.UltraMemLayer) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.5).step()


def fused_optimizer_step(layer: um.UltraMemLayer) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.sin(torch.arange(parameter.numel()).float()).view_as(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True).step()


def load_state(layer: um.UltraMemLayer) -> None:
    layer.load_state_dict({k: v * 2 + 0.3 for k, v in layer.state_dict().items()})


def assign_state(layer: um.UltraMemLayer) -> None:
    state = {k: v * 2 + 0.3 for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def new_parameter(layer: um.UltraMemLayer) -> None:
    layer.keys = nn.Parameter(layer.keys.detach().flip(3) * 1.5)


def new_storage(layer: um.UltraMemLayer) -> None:
    layer.keys.data = layer.keys.detach().flip(3) * 1.5


def write_through_data_in_training(layer: um.UltraMemLayer) -> None:
    layer.train()
    layer.keys.data.copy_(layer.keys.data.flip(3) * 1.5)
    layer.eval()


def write_through_data_and_refresh(layer: um.UltraMemLayer) -> None:
    layer.keys.data.copy_(layer.keys.data.flip(3) * 1.5)
    layer.refresh_cache()


@pytest.mark.parametrize(
    "change",
    [
        scale_in_place,
        scale_gain,
        change_core,
        optimizer_step,
        fused_optimizer_step,
        load_state,
        assign_state,
        new_parameter,
        new_storage,
        write_through_data_in_training,
        write_through_data_and_refresh,
    ],
)
def test_is_never_stale(change: Callable[[um.UltraMemLayer], None]) -> None:
    layer, table = layer_and_table()
    x = tokens(8, 24)
    layer.eval()
    before = cached(layer, x, table)
    for _ in range(3):
        # Three times: replaced storage may come back at an address that was used before.
        change(layer)
        after = cached(layer, x, table)
        assert torch.equal(after, uncached(layer, x, table))
        assert not torch.equal(after, before)
        before = after


def test_dtype_and_device_moves() -> None:
    layer, table = layer_and_table()
    x = tokens(8, 24)
    layer.eval()
    cached(layer, x, table)
    layer.double()
    table.double()
    y = cached(layer, x.double(), table)
    assert torch.equal(y, uncached(layer, x.double(), table))
    layer.float()
    table.float()
    assert torch.equal(cached(layer, x, table), uncached(layer, x, table))
    layer.to("meta")
    assert layer._cache == {}, "what was cached lies on the old device"


def test_inference_mode() -> None:
    layer, table = layer_and_table()
    x = tokens(8, 24)
    layer.eval()
    with torch.inference_mode():
        first = layer(x, table)
    scale_in_place(layer)
    with torch.inference_mode():
        second = layer(x, table)
    assert not torch.equal(first, second)
    assert torch.equal(second, uncached(layer, x, table))
    assert torch.equal(second, cached(layer, x, table))
    with torch.inference_mode():
        made_there = copy.deepcopy(layer)
        assert torch.equal(made_there(x, table), second)
        made_there.keys.mul_(torch.linspace(0.5, 2.0, 6))
        assert not torch.equal(made_there(x, table), second)


def test_functional_call_uses_the_given_parameters() -> None:
    layer, table = layer_and_table()
    x = tokens(8, 24)
    layer.eval()
    cached(layer, x, table)
    parameters = {name: p.detach() * 1.3 + 0.2 for name, p in layer.named_parameters()}
    other = copy.deepcopy(layer)
    other.load_state_dict(parameters)
    with torch.no_grad():
        y = torch.func.functional_call(layer, parameters, (x, table))
    assert torch.equal(y, uncached(other, x, table))


def test_refreshes_in_place_for_captured_graphs() -> None:
    layer, table = layer_and_table()
    x = tokens(8, 24)
    layer.eval()
    cached(layer, x, table)
    entry = layer._cache[torch.float32]
    address = entry.keys.data_ptr()
    layer.train()
    scale_in_place(layer)
    layer.eval()
    cached(layer, x, table)
    assert layer._cache[torch.float32] is entry
    assert entry.keys.data_ptr() == address
    expected = um.ops.rms_norm(layer.keys, layer.key_norm, eps=layer.config.eps)
    assert torch.equal(entry.keys, expected.detach())


def test_is_no_part_of_state_or_copies() -> None:
    layer, table = layer_and_table()
    names = list(layer.state_dict())
    layer.eval()
    cached(layer, tokens(8, 24), table)
    assert list(layer.state_dict()) == names
    assert copy.deepcopy(layer)._cache == {}
    assert len(pickle.loads(pickle.dumps(layer))._cache) == 0
    assert len(layer._cache) == 1


@pytest.mark.parametrize("overrides", [{}, PKM])
def test_a_move_to_the_same_place_keeps_the_memory(overrides: dict[str, object]) -> None:
    layer, table = layer_and_table(**overrides)
    x = tokens(8, 24)
    layer.eval()
    cached(layer, x, table)
    entry = layer._cache[torch.float32]
    addresses = [tensor.data_ptr() for tensor in entry.tensors]
    layer.to("cpu").float().to(torch.float32)
    layer.key_norm.data.mul_(1.5)
    if layer.cores is not None:
        layer.cores.data[:, :, 0, 1] += 2.0
    layer.refresh_cache()
    assert layer._cache[torch.float32] is entry
    assert [tensor.data_ptr() for tensor in entry.tensors] == addresses
    expected = um.ops.rms_norm(layer.keys, layer.key_norm, eps=layer.config.eps)
    assert torch.equal(entry.keys, expected.detach())
    if layer.cores is not None:
        assert entry.tucker is not None
        made = (layer.cores, *um.ops.tucker_filter(layer.cores)[:2])
        for mine, new in zip(entry.tucker, made, strict=True):
            assert torch.equal(mine, new)


def test_a_move_of_the_dtype_drops_what_was_cached() -> None:
    layer, table = layer_and_table()
    layer.eval()
    cached(layer, tokens(8, 24), table)
    layer.bfloat16()
    assert layer._cache == {}
    layer.refresh_cache()
    assert layer._cache == {}


def test_parameters_of_another_dtype_get_memory_of_their_own() -> None:
    layer, table = layer_and_table()
    x = tokens(8, 24)
    layer.eval()
    cached(layer, x, table)
    entry = layer._cache[torch.float32]
    assert layer.cores is not None
    # Its filter is float64, which the float32 memory would round.
    layer.cores = nn.Parameter(layer.cores.detach().double())
    cached(layer, x, table)
    other = layer._cache[torch.float32]
    assert other is not entry
    assert other.tucker is not None
    assert other.tucker.u.dtype == torch.float64


@dataclasses.dataclass(eq=False)
class FakeStream:
    """Knows the work that is certain to be done before what is enqueued next."""

    done: set[str] = dataclasses.field(default_factory=set)
    capturing: bool = False

    def record_event(self) -> frozenset[str]:
        return frozenset(self.done)

    def wait_event(self, event: frozenset[str]) -> None:
        assert not self.capturing, "a capturing stream waits for an event from outside"
        self.done |= event

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


class FakeTensor:
    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.streams: set[FakeStream] = set()

    def record_stream(self, stream: FakeStream) -> None:
        self.streams.add(stream)


class FakeCuda:
    """Stands for the streams of a device where there is none."""

    def __init__(self) -> None:
        self.current = FakeStream()

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[FakeStream]:
        before, self.current = self.current, stream
        yield stream
        self.current = before


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: fake.current)
    monkeypatch.setattr(_retrieval_cache, "is_capturing", lambda _: fake.current.capturing)
    return fake


def test_streams_wait_for_each_other(fake_cuda: FakeCuda) -> None:
    tensors = FakeTensor(), FakeTensor()
    order = _retrieval_cache.StreamOrder(tensors)  # type: ignore[arg-type]
    first, second, third = FakeStream(), FakeStream(), FakeStream()

    def fill(stream: FakeStream, name: str) -> None:
        with fake_cuda.stream(stream):
            order.before_fill()
            stream.done.add(name)
            order.after_fill()

    def read(stream: FakeStream, name: str) -> None:
        with fake_cuda.stream(stream):
            order.before_read()
            stream.done.add(name)

    fill(first, "fill 1")
    read(first, "read 1 on the first")
    first.done.add("later work")
    read(second, "read 1 on the second")
    assert second.done == {"fill 1", "read 1 on the second"}, "waits for the fill, and no more"
    assert all(second in tensor.streams for tensor in tensors)

    fill(third, "fill 2")
    assert third.done >= {"fill 1", "read 1 on the first", "read 1 on the second"}
    assert all(third in tensor.streams for tensor in tensors)
    read(first, "read 2")
    assert "fill 2" in first.done
    assert "fill 2" not in second.done
    read(second, "read 2 on the second")
    assert "fill 2" in second.done


def test_a_capturing_stream_waits_for_nothing(fake_cuda: FakeCuda) -> None:
    tensor = FakeTensor()
    order = _retrieval_cache.StreamOrder((tensor,))  # type: ignore[arg-type]
    order.before_fill()
    order.after_fill()
    with fake_cuda.stream(FakeStream(capturing=True)) as capturing:
        order.before_read()
        assert capturing not in tensor.streams
    order.before_fill()


def test_refresh_is_refused_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    import ultramem_cuda.layer as layer_module

    layer, table = layer_and_table()
    layer.eval()
    cached(layer, tokens(8, 24), table)
    monkeypatch.setattr(layer_module, "is_capturing", lambda _: True)
    with pytest.raises(RuntimeError, match=r"refresh_cache: must not be called while a CUDA graph"):
        layer.refresh_cache()


@pytest.mark.gpu
def test_streams_share_the_cache() -> None:
    layer, table = layer_and_table()
    layer.to("cuda").eval()
    table.to("cuda")
    x = tokens(8, 24).cuda()
    before = uncached(layer, x, table)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)
        filled = cached(layer, x, table)
    with torch.cuda.stream(second):
        read_after_fill = cached(layer, x, table)
    torch.cuda.synchronize()
    torch.testing.assert_close(filled, before)
    assert torch.equal(read_after_fill, filled)

    with torch.cuda.stream(second):
        torch.cuda._sleep(200_000_000)
        read_before_refill = cached(layer, x, table)
    with torch.cuda.stream(first), torch.no_grad():
        layer.keys.mul_(torch.linspace(0.5, 2.0, 6, device="cuda"))
        layer.refresh_cache()
        refilled = cached(layer, x, table)
    torch.cuda.synchronize()
    assert torch.equal(read_before_refill, filled)
    torch.testing.assert_close(refilled, uncached(layer, x, table))
    assert not torch.equal(refilled, filled)


@pytest.mark.gpu
def test_a_captured_graph_follows_refresh_after_a_move_to_the_same_place() -> None:
    layer, table = layer_and_table()
    layer.to("cuda").eval()
    table.to("cuda")
    x = tokens(8, 24).cuda()
    before = cached(layer, x, table)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x, table)
    graph.replay()
    assert torch.equal(y, before)
    layer.to("cuda")
    with torch.no_grad():
        layer.keys.mul_(torch.linspace(0.5, 2.0, 6, device="cuda"))
    layer.refresh_cache()
    graph.replay()
    torch.testing.assert_close(y, uncached(layer, x, table))
    assert not torch.equal(y, before)
