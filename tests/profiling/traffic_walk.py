"""Layers run kernel by kernel, with every tensor that a kernel takes or gives added up.

An account by kernel of what the byte model accounts for by tensor. The arithmetic is real: tests
hold outputs and gradients against autograd, so that no kernel lacks an input it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_cuda.examples.lm.layers import MoE, SwiGLU


class Walk:
    """Bytes that kernels read and write, of parameters (and their gradients) and of the rest."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {tensor.data_ptr() for tensor in parameters}
        self.parameter_bytes = 0
        self.activation_bytes = 0
        self.gradient_bytes = 0

    def __call__(self, kernel: Callable[..., Any], *inputs: Tensor) -> Any:
        outputs = kernel(*inputs)
        for tensor in inputs:
            if tensor.data_ptr() in self._parameters:
                self.parameter_bytes += tensor.nbytes
            else:
                self.activation_bytes += tensor.nbytes
        for tensor in outputs if isinstance(outputs, tuple) else (outputs,):
            self.activation_bytes += tensor.nbytes
        return outputs

    def gradient(self, kernel: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A kernel whose result is the gradient of a parameter."""
        grad: Tensor = self(kernel, *inputs)
        self.activation_bytes -= grad.nbytes
        self.gradient_bytes += grad.nbytes
        return grad


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_bwd(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad * up * slope, grad * gate * sigmoid], dim=-1)


def ffn_forward(walk: Walk, module: SwiGLU, x: Tensor) -> dict[str, Tensor]:
    gate_up = walk(F.linear, x, module.gate_up.weight)
    product = walk(swiglu, gate_up)
    y = walk(F.linear, product, module.down.weight)
    return {"gate_up": gate_up, "product": product, "y": y}


def ffn_backward(
    walk: Walk, module: SwiGLU, x: Tensor, saved: dict[str, Tensor], grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of both weights."""
    grad_product = walk(torch.matmul, grad_y, module.down.weight)
    grad_down = walk.gradient(lambda a, b: a.T @ b, grad_y, saved["product"])
    grad_gate_up = walk(swiglu_bwd, grad_product, saved["gate_up"])
    grad_x = walk(torch.matmul, grad_gate_up, module.gate_up.weight)
    grad_weight = walk.gradient(lambda a, b: a.T @ b, grad_gate_up, x)
    return grad_x, grad_weight, grad_down


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = logits.softmax(dim=-1)
    gates, chosen = probabilities.topk(k, dim=-1)
    return probabilities, gates / gates.sum(dim=-1, keepdim=True), chosen


def route_bwd(grad_gates: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
    kept = probabilities.gather(1, chosen)
    total = kept.sum(dim=-1, keepdim=True)
    grad_kept = (grad_gates - (grad_gates * kept / total).sum(-1, keepdim=True)) / total
    grad = torch.zeros_like(probabilities).scatter(1, chosen, grad_kept)
    return probabilities * (grad - (grad * probabilities).sum(-1, keepdim=True))


class Dispatch:
    """A mixture of experts, its experts' weights held apart so that only those used are read."""

    def __init__(self, module: MoE) -> None:
        self.router = module.router.weight.detach()
        self.k = module.experts_per_token
        self.gate_up = [w.clone() for w in module.gate_up.detach()]
        self.down = [w.clone() for w in module.down.detach()]

    @property
    def weights(self) -> list[Tensor]:
        return [self.router, *self.gate_up, *self.down]

    def forward(self, walk: Walk, x: Tensor) -> dict[str, Tensor]:
        logits = walk(F.linear, x, self.router)
        probabilities, gates, chosen = walk(lambda a: route(a, self.k), logits)
        order = walk(lambda a: a.flatten().argsort(stable=True), chosen)
        gathered = walk(lambda a, i: a[i // self.k], x, order)
        self.counts = torch.bincount(chosen.flatten(), minlength=len(self.down)).tolist()
        gate_up = self._grouped(walk, gathered, self.gate_up)
        product = walk(swiglu, gate_up)
        outputs = self._grouped(walk, product, self.down)
        y = walk(self._combine, outputs, gates, order)
        return {
            "probabilities": probabilities,
            "gates": gates,
            "chosen": chosen,
            "order": order,
            "gathered": gathered,
            "gate_up": gate_up,
            "product": product,
            "outputs": outputs,
            "y": y,
        }

    @property
    def used(self) -> list[int]:
        return [expert for expert, count in enumerate(self.counts) if count]

    def _grouped(self, walk: Walk, rows: Tensor, weights: list[Tensor]) -> Tensor:
        def products(rows: Tensor, *weights: Tensor) -> Tensor:
            parts = rows.split([self.counts[expert] for expert in self.used])
            return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])

        result: Tensor = walk(products, rows, *[weights[expert] for expert in self.used])
        return result

    def _grouped_bwd(self, walk: Walk, rows: Tensor, weights: list[Tensor]) -> Tensor:
        def products(rows: Tensor, *weights: Tensor) -> Tensor:
            parts = rows.split([self.counts[expert] for expert in self.used])
            return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])

        result: Tensor = walk(products, rows, *[weights[expert] for expert in self.used])
        return result

    def _weight_gradient(self, walk: Walk, rows: Tensor, grad: Tensor) -> Tensor:
        """[X, ...], zero for experts without tokens."""
        return walk.gradient(
            lambda a, b: torch.stack(
                [u.T @ v for u, v in zip(a.split(self.counts), b.split(self.counts), strict=True)]
            ),
            rows,
            grad,
        )

    def _combine(self, outputs: Tensor, gates: Tensor, order: Tensor) -> Tensor:
        by_choice = torch.empty_like(outputs).index_copy(0, order, outputs)
        return (by_choice.view(*gates.shape, -1) * gates[..., None]).sum(1)

    def backward(
        self, walk: Walk, x: Tensor, saved: dict[str, Tensor], grad_y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, router, gate_up and down."""

        def uncombine(
            grad: Tensor, outputs: Tensor, gates: Tensor, order: Tensor
        ) -> tuple[Tensor, Tensor]:
            rows = grad[order // self.k]
            dots = (rows * outputs).sum(-1)
            grad_gates = torch.empty_like(dots).index_copy(0, order, dots).view(gates.shape)
            return rows * gates.flatten()[order][:, None], grad_gates

        grad_outputs, grad_gates = walk(
            uncombine, grad_y, saved["outputs"], saved["gates"], saved["order"]
        )
        grad_product = self._grouped_bwd(walk, grad_outputs, self.down)
        grad_down = self._weight_gradient(walk, saved["product"], grad_outputs)
        grad_gate_up = walk(swiglu_bwd, grad_product, saved["gate_up"])
        grad_gathered = self._grouped_bwd(walk, grad_gate_up, self.gate_up)
        grad_weight = self._weight_gradient(walk, saved["gathered"], grad_gate_up)
        grad_x = walk(
            lambda a, order: torch.zeros_like(x).index_add(0, order // self.k, a),
            grad_gathered,
            saved["order"],
        )
        grad_logits = walk(route_bwd, grad_gates, saved["probabilities"], saved["chosen"])
        grad_router = walk.gradient(lambda a, b: a.T @ b, grad_logits, x)
        # Adds to what the experts gave.
        grad_x = walk(lambda base, a, b: base + a @ b, grad_x, grad_logits, self.router)
        return grad_x, grad_router, grad_weight, grad_down
