"""The dropless MoE against a loop over experts, and what makes it fit for CUDA graphs."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import no_host_sync
from torch import Tensor

from ultramem_cuda.profiling import compilation, moe_dispatch, moe_packages
from ultramem_cuda.profiling.moe_dispatch import DroplessMoE, arrange
from ultramem_cuda.profiling.moe_packages import installed_moe_packages, packaged_moe
from ultramem_cuda.profiling.timing import capture

D, INNER, X, K = 32, 16, 6, 2

# Relative L2 error. In bfloat16 the logits are rounded, which moves a weight by 2^-8 of its logit.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_moe(
    dtype: torch.dtype = torch.float32, device: str = "cpu", **options: object
) -> DroplessMoE:
    torch.manual_seed(0)
    sizes = {"d_model": D, "inner": INNER, "num_experts": X, "experts_per_token": K, **options}
    return DroplessMoE(**sizes, dtype=dtype, device=device)  # type: ignore[arg-type]


def tokens(count: int, like: DroplessMoE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, like.d_model, generator=generator).to(like.down)


def loop_over_experts(moe: DroplessMoE, x: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of x, router, gate_up and down, in float64, with the experts it chose."""
    chosen = moe.route(x)[1].cpu()
    leaves = [t.detach().cpu().double().requires_grad_() for t in (x, *moe.parameters())]
    x, router, gate_up, down = leaves
    weights = (x @ router.T).softmax(-1).gather(1, chosen)
    if moe.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    outputs = []
    for token, experts, scale in zip(x, chosen.tolist(), weights, strict=True):
        y = torch.zeros_like(token)
        for weight, expert in zip(scale, experts, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            y = y + weight * (down[expert] @ (F.silu(gate) * up))
        outputs.append(y)
    y = torch.stack(outputs)
    return y.detach(), list(torch.autograd.grad(y, leaves, grad.cpu().double()))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected.cpu().double()).norm() / expected.norm())


def check_against_loop(moe: DroplessMoE, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    grad = tokens(len(x), moe, seed=2)
    y = moe(x)
    gradients = torch.autograd.grad(y, (x, *moe.parameters()), grad)
    expected, expected_gradients = loop_over_experts(moe, x.detach(), grad)
    bound = BOUND[x.dtype]
    assert y.dtype == x.dtype
    assert relative_error(y.detach(), expected) <= bound
    names = ("x", *(name for name, _ in moe.named_parameters()))
    for name, ours, theirs in zip(names, gradients, expected_gradients, strict=True):
        assert relative_error(ours, theirs) <= bound, name
    with torch.no_grad():
        assert relative_error(moe(x), expected) <= bound


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("count", [1, 7, 33])
def test_moe_is_a_loop_over_experts(count: int, dtype: torch.dtype, device: str) -> None:
    moe = make_moe(dtype, device)
    check_against_loop(moe, tokens(count, moe))


@pytest.mark.parametrize("dtype", BOUND)
def test_normalized_weights(dtype: torch.dtype, device: str) -> None:
    moe = make_moe(dtype, device, normalize=True)
    x = tokens(9, moe)
    torch.testing.assert_close(
        moe.route(x)[0].sum(1).cpu(), torch.ones(9, dtype=moe.route(x)[0].dtype)
    )
    check_against_loop(moe, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_on_the_same_experts(dtype: torch.dtype, device: str) -> None:
    moe = make_moe(dtype, device)
    x = tokens(40, moe)
    x[:, 0] = 1.0
    with torch.no_grad():
        moe.router[:, 0] = 0.0
        moe.router[[1, 4], 0] = 8.0
    assert moe.route(x)[1].unique().tolist() == [1, 4]
    assert int(moe.distinct_experts(x)) == 2
    check_against_loop(moe, x)


def test_no_tokens(device: str) -> None:
    moe = make_moe(torch.bfloat16, device)
    x = tokens(0, moe).requires_grad_()
    y = moe(x)
    assert y.shape == (0, D)
    y.sum().backward()
    assert int(moe.distinct_experts(x)) == 0
    for parameter in moe.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_leading_dimensions_are_kept() -> None:
    moe = make_moe()
    x = tokens(12, moe)
    torch.testing.assert_close(moe(x.view(3, 4, D)), moe(x).view(3, 4, D))


def test_widths_without_grouped_products_loop() -> None:
    aligned, odd = make_moe(), make_moe(d_model=30, inner=5)
    assert (aligned.products, odd.products) == ("grouped_mm", "loop")
    check_against_loop(odd, tokens(11, odd))
    assert make_moe(torch.float64).products == "loop"


def test_gradients_by_finite_differences() -> None:
    moe = make_moe(torch.float64, d_model=6, inner=3)
    # At most one row's experts tie or nearly so: the step must not change the choice.
    x = tokens(5, moe)
    gap = (x @ moe.router.T).sort(-1).values.diff().min()
    assert gap > 1e-3
    leaves = [t.detach().requires_grad_() for t in (x, *moe.parameters())]

    def run(*arguments: Tensor) -> Tensor:
        return moe_dispatch._arranged_moe(*arguments, K, False, moe_dispatch._looped_product)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("compared", [0, 1 << 20])
@pytest.mark.parametrize("num_experts", [5, 300])
def test_arranged_rows(
    compared: int, num_experts: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_dispatch, "MAX_COMPARED", compared)
    experts = torch.randint(num_experts - 1, (67, 3), generator=torch.Generator().manual_seed(0))
    order, place, ends = (t.cpu() for t in arrange(experts.to(device), num_experts))
    ids = experts.flatten()
    assert order.tolist() == sorted(range(len(ids)), key=lambda row: (int(ids[row]), row))
    assert place.flatten()[order].tolist() == list(range(len(ids)))
    assert ends.tolist() == [int((ids <= expert).sum()) for expert in range(num_experts)]
    assert ends.dtype == torch.int32


def test_many_rows_are_sorted() -> None:
    moe = make_moe()
    x = tokens(1 + moe_dispatch.MAX_COMPARED // K, moe)
    check_against_loop(moe, x)


def test_weights_are_the_softmax_over_all_experts() -> None:
    moe = make_moe(torch.bfloat16)
    x = tokens(50, moe)
    weights, experts = moe.route(x)
    assert weights.dtype == torch.float32
    best = F.linear(x, moe.router).float().softmax(-1).topk(K)
    torch.testing.assert_close(weights, best.values)
    assert experts.shape == (50, K)
    # Rounded logits tie: then either expert may be named, never one twice.
    assert all(len(set(row)) == K for row in experts.tolist())


def test_distinct_experts() -> None:
    moe = make_moe(num_experts=40)
    x = tokens(9, moe)
    assert int(moe.distinct_experts(x)) == moe.route(x)[1].unique().numel()
    assert int(moe.distinct_experts(x)) < 19


# ---- compiled ------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions compiled: whole graphs as on a GPU, run by torch's own kernels."""
    names: list[str] = []

    def trace(function, mode=None):  # type: ignore[no-untyped-def]
        names.append(function.__name__)
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(moe_dispatch, "compile_static", trace)
    return names


def test_graph_is_whole(traced: list[str]) -> None:
    moe = make_moe(torch.bfloat16, compiled=True)
    check_against_loop(moe, tokens(7, moe))
    assert traced == ["_arranged_moe", "_arranged_moe"]


def test_few_tokens_without_gradients_go_one_by_one(traced: list[str]) -> None:
    moe = make_moe(torch.bfloat16, compiled=True)
    check_against_loop(moe, tokens(3, moe))
    assert traced == ["_arranged_moe", "_one_by_one_inner", "_one_by_one_down"]


def test_recompiles_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    limits = []

    def look(x: Tensor) -> Tensor:
        limits.append(torch._dynamo.config.recompile_limit)
        return x

    compilation.compile_static.__wrapped__(look)(torch.ones(1))
    assert limits == [256]


def test_compiled_needs_bfloat16() -> None:
    with pytest.raises(ValueError, match=r"compiled: .* got torch.float32, d_model = 32"):
        make_moe(compiled=True)
    assert not make_moe().compiled


def test_compiled_needs_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"compiled: torch\.compile needs triton"):
        compilation.resolve_compiled(True, cuda)
    assert compilation.resolve_compiled(None, cuda) is False
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert compilation.resolve_compiled(None, cuda) is True
    assert compilation.resolve_compiled(None, torch.device("cpu")) is False
    assert compilation.resolve_compiled(True, torch.device("cpu")) is True


@pytest.mark.parametrize(("experts", "chosen"), [(2, 3), (4, 0), (1024, 2)])
def test_impossible_numbers_of_experts(experts: int, chosen: int) -> None:
    with pytest.raises(ValueError, match=f"experts_per_token = {chosen}, num_experts = {experts}"):
        DroplessMoE(8, 8, experts, chosen)


def test_another_width() -> None:
    with pytest.raises(ValueError, match=r"x: .* d_model = 32, got shape \[3, 8\]"):
        make_moe()(torch.zeros(3, 8))


# ---- packages ------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """Stand-ins for the packages, as far as the builders call them; the test completes them."""
    names = (
        *("transformers", "transformers.models", "transformers.models.olmoe"),
        "transformers.models.olmoe.modeling_olmoe",
        "transformers.models.olmoe.configuration_olmoe",
        *("scattermoe", "scattermoe.mlp"),
    )
    modules = {}
    for name in names:
        modules[name] = module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)

    class Config:
        def __init__(self, **sizes: object) -> None:
            self.sizes = sizes

    class Olmoe(torch.nn.Module):
        """Laid out as OLMoE's block is, from OLMoE's configuration."""

        def __init__(self, config: Config) -> None:
            super().__init__()
            assert config._experts_implementation == "grouped_mm"  # type: ignore[attr-defined]
            self.sizes = config.sizes
            self.gate, self.experts = torch.nn.Module(), torch.nn.Module()

        def forward(self, hidden: Tensor) -> Tensor:
            x = hidden.view(-1, self.sizes["hidden_size"])
            best = F.linear(x, self.gate.weight).softmax(-1).topk(self.sizes["num_experts_per_tok"])
            gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
            gate, up = torch.einsum("td,tkid->tki", x, gate_up[best.indices]).chunk(2, -1)
            inner = F.silu(gate) * up * best.values[..., None]
            return torch.einsum("tki,tkdi->td", inner, down[best.indices]).view(hidden.shape)

    class Scatter(torch.nn.Module):
        """Laid out as ScatterMoE's GLUMLP is: its first half is multiplied, its second gates."""

        def __init__(self, d_model: int, inner: int, num_experts: int, top_k: int) -> None:
            super().__init__()
            self.experts, self.output_experts = torch.nn.Module(), torch.nn.Module()

        def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
            both = torch.einsum("td,tkid->tki", x, self.experts.weight[experts])
            up, gate = both.chunk(2, -1)
            down = self.output_experts.weight[experts]
            return torch.einsum("tki,tkdi,tk->td", F.silu(gate) * up, down, weights)

    modules["transformers.models.olmoe.configuration_olmoe"].OlmoeConfig = Config  # type: ignore[attr-defined]
    modules["transformers.models.olmoe.modeling_olmoe"].OlmoeSparseMoeBlock = Olmoe  # type: ignore[attr-defined]
    modules["scattermoe.mlp"].GLUMLP = Scatter  # type: ignore[attr-defined]
    return modules


def test_installed_packages_agree(stand_ins: dict[str, types.ModuleType]) -> None:
    found, notes = installed_moe_packages()
    assert [moe.package for moe in found] == ["transformers", "scattermoe"]
    assert notes == []
    moe = make_moe()
    x = tokens(20, moe)
    for package in found:
        forward = packaged_moe(package, moe, x)
        other = tokens(8, moe, seed=5)
        torch.testing.assert_close(forward(other), moe(other))
        assert package.title.startswith(f"{package.package} ")


def test_package_that_computes_something_else(stand_ins: dict[str, types.ModuleType]) -> None:
    found, _ = installed_moe_packages()
    olmoe = stand_ins["transformers.models.olmoe.modeling_olmoe"].OlmoeSparseMoeBlock
    moe = make_moe()
    right = olmoe.forward
    olmoe.forward = lambda self, hidden: right(self, hidden) * 1.001
    with pytest.raises(RuntimeError, match=r"something else: relative distance 1\.0e-03"):
        packaged_moe(found[0], moe, tokens(20, moe))
    olmoe.forward = lambda self, hidden: right(self, hidden) * float("nan")
    with pytest.raises(RuntimeError, match="computes something else"):
        packaged_moe(found[0], moe, tokens(20, moe))


def test_package_of_another_version(stand_ins: dict[str, types.ModuleType]) -> None:
    found, _ = installed_moe_packages()
    del stand_ins["scattermoe.mlp"].GLUMLP  # type: ignore[attr-defined]
    moe = make_moe()
    with pytest.raises(RuntimeError, match=r"^scattermoe .* could not be run: AttributeError"):
        packaged_moe(found[1], moe, tokens(20, moe))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_packages.importlib.util, "find_spec", lambda name: None)
    found, notes = installed_moe_packages()
    assert found == []
    assert notes == ["not compared, because not installed: the MoE of scattermoe, transformers"]


# ---- GPU -----------------------------------------------------------------------------------------


def gpu_moe(compiled: bool) -> DroplessMoE:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped_mm has no kernel for this GPU")
    if compiled and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    sizes = {"d_model": 256, "inner": 128, "num_experts": 16, "experts_per_token": 4}
    return make_moe(torch.bfloat16, "cuda", compiled=compiled, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_graph_replays_what_eager_computes(count: int, compiled: bool) -> None:
    moe = gpu_moe(compiled)
    x = tokens(count, moe).requires_grad_()
    grad = tokens(count, moe, seed=2)
    leaves = (x, *moe.parameters())
    results: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            y = moe(x)
        results[:] = [y, *torch.autograd.grad(moe(x), leaves, grad)]

    run()
    expected = [result.clone() for result in results]
    graph = capture([run])
    with torch.no_grad():
        x.copy_(tokens(count, moe, seed=3))
    graph.replay()
    assert relative_error(results[0], expected[0]) > 0.1
    with torch.no_grad():
        x.copy_(tokens(count, moe))
    graph.replay()
    for replayed, eager in zip(results, expected, strict=True):
        assert relative_error(replayed, eager) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [1, 7, 2000])
def test_nothing_waits_for_the_gpu(count: int, compiled: bool) -> None:
    moe = gpu_moe(compiled)
    x = tokens(count, moe).requires_grad_()
    grad = tokens(count, moe, seed=2)

    def run() -> None:
        with torch.no_grad():
            moe(x)
        moe(x).backward(grad)

    run()  # compiles
    with no_host_sync():
        run()
        used = moe.distinct_experts(x)
    assert 4 <= int(used) <= 16


@pytest.mark.gpu
def test_compiled_and_not_agree_on_many_tokens() -> None:
    plain, compiled = gpu_moe(False), gpu_moe(True)
    x = tokens(3000, plain)
    with torch.no_grad():
        assert relative_error(compiled(x), plain(x)) <= 1e-2
