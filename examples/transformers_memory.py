"""A decoder of transformers with and without memory layers, on equal active parameters.

    python -m examples.transformers_memory                     # from a checkout
    python -m ultramem_cuda.examples.transformers_memory       # as installed

Both models start at random and see the same bytes of the standard library's source. The one with
memory has a narrower MLP, so that a token uses as many parameters in both. The trained one is
saved, loaded with ``AutoModelForCausalLM`` and must generate the same text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

import ultramem_cuda as um
from ultramem_cuda.integrations.transformers import add_memory

from .lm.data import WindowSampler, fixed_windows, load_corpus
from .lm.files import write_atomically

# What the widths of MLPs are multiples of, and how far active parameters may lie apart.
WIDTH_STEP = 8
ACTIVE_TOLERANCE = 0.01
VAL_FRACTION = 0.03
FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
PROMPT = b"def __init__(self, "


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the models and how they are trained; both kinds alike.

    ``intermediate_size`` is the width of the MLPs of the model without memory. Tables learn at
    ``table_lr_multiplier`` times the rate at first, a factor that falls to 1; one this small is
    read so often that it needs no more.
    """

    family: str = "qwen3"
    hidden_size: int = 64
    num_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 264
    num_keys: int = 48
    key_dim: int = 16
    topk: int = 16
    pre_value_dim: int = 32
    value_dim: int = 32
    context: int = 128
    batch: int = 64
    steps: int = 200
    lr: float = 1e-2
    warmup: int = 20
    final_lr_ratio: float = 0.1
    table_lr_multiplier: float = 1.0
    weight_decay: float = 0.1
    clip: float = 1.0
    val_windows: int = 1024
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model reached; losses in nats a byte."""

    active_parameters: int
    total_parameters: int
    intermediate_size: int
    first_val_loss: float
    val_loss: float
    train_losses: list[float]
    seconds: float


def memory_config(settings: Settings) -> um.UltraMemConfig:
    """Memory layers whose windows of the table do not overlap."""
    return um.UltraMemConfig(
        d_model=settings.hidden_size,
        num_layers=settings.num_layers,
        num_keys=settings.num_keys,
        key_dim=settings.key_dim,
        topk=settings.topk,
        pre_value_dim=settings.pre_value_dim,
        value_dim=settings.value_dim,
        num_slots=settings.num_layers * settings.num_keys**2,
        topology="private",
    )


def build(settings: Settings, intermediate_size: int, with_memory: bool) -> Any:
    """A decoder over bytes with weights of N(0, 1/D), seeded."""
    torch.manual_seed(settings.seed)
    config_class, model_class = FAMILIES[settings.family]
    model = model_class(
        config_class(
            vocab_size=256,
            hidden_size=settings.hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_attention_heads,
            head_dim=settings.hidden_size // settings.num_attention_heads,
            max_position_embeddings=2 * settings.context,
            initializer_range=settings.hidden_size**-0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return add_memory(model, memory_config(settings)) if with_memory else model


def active_parameters(model: torch.nn.Module) -> int:
    """Parameters that a token uses: all, but of the table only the rows that it reads."""
    active = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, um.MemoryTable):
            active -= sum(parameter.numel() for parameter in module.parameters())
        if isinstance(module, um.UltraMemLayer):
            config = module.config
            active += config.slots_per_token * (config.pre_value_dim + config.value_dim)
    return active


def matched_width(settings: Settings) -> int:
    """The MLP width with which the model with memory has the active parameters of the other.

    Counted on built models, on the meta device.

    Raises:
        ValueError: no width is within ``ACTIVE_TOLERANCE``.
    """
    with torch.device("meta"):
        dense = active_parameters(build(settings, settings.intermediate_size, False))
        narrow = active_parameters(build(settings, WIDTH_STEP, True))
        step = active_parameters(build(settings, 2 * WIDTH_STEP, True)) - narrow
        width = WIDTH_STEP * (1 + round((dense - narrow) / step))
        if width < WIDTH_STEP:
            raise ValueError("intermediate_size: too small to pay for the memory layers")
        active = active_parameters(build(settings, width, True))
    if abs(active / dense - 1) > ACTIVE_TOLERANCE:
        raise ValueError(f"intermediate_size: {active} and {dense} active parameters do not match")
    return width


def train(settings: Settings, model: Any, train_stream: Any, val_stream: Any) -> Result:
    """Trains a model that :func:`build` has made."""
    sampler = WindowSampler(train_stream, settings.context, settings.seed)
    val_inputs, val_targets = fixed_windows(val_stream, settings.context, settings.val_windows)
    groups = um.optim.param_groups(
        model, settings.lr, settings.table_lr_multiplier, weight_decay=settings.weight_decay
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    factors = um.optim.lr_lambdas(groups, schedule_of(settings), max_steps=settings.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    first_val_loss = validation_loss(model, val_inputs, val_targets, settings.batch)
    losses = []
    start = time.perf_counter()
    model.train()
    for step in range(settings.steps):
        inputs, targets = sampler.batch(step * settings.batch, settings.batch)
        loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Result(
        active_parameters=active_parameters(model),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        intermediate_size=model.config.intermediate_size,
        seconds=time.perf_counter() - start,
        first_val_loss=first_val_loss,
        val_loss=validation_loss(model, val_inputs, val_targets, settings.batch),
        train_losses=losses,
    )


def schedule_of(settings: Settings) -> Any:
    """Learning rate over its peak: a linear warm-up, then a cosine."""

    def factor(step: int) -> float:
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return settings.final_lr_ratio + (1.0 - settings.final_lr_ratio) * cosine

    return factor


def loss_of(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of inputs and targets, int64 [B, L], nats a byte."""
    logits = model(inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validation_loss(model: Any, inputs: Tensor, targets: Tensor, batch: int) -> float:
    """That of all windows, in batches; leaves the model in eval mode."""
    model.eval()
    total = 0.0
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        total += loss_of(model, x, y).item() * len(x)
    return total / len(inputs)


def generate(model: Any, new_tokens: int, use_cache: bool) -> Tensor:
    """Greedy continuation of ``PROMPT``, int64 [length]."""
    prompt = torch.tensor([list(PROMPT)])
    return model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )[0]


def saved_and_loaded(model: Any, folder: Path, new_tokens: int) -> tuple[bytes, bool]:
    """The text that a model generates, and whether it does once saved and loaded, and without a
    KV cache, too."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = generate(model, new_tokens, use_cache=True)
    same = torch.equal(tokens, generate(loaded, new_tokens, use_cache=True))
    same = same and torch.equal(tokens, generate(model, new_tokens, use_cache=False))
    return bytes(tokens.tolist()), same


def compare(settings: Settings, folder: Path, report: Callable[[str], object]) -> dict[str, Any]:
    """Trains both models; what they reached, as plain data.

    Args:
        settings: of both.
        folder: where the model with memory is saved.
        report: takes a line for each model, and one for what was loaded.
    """
    corpus = load_corpus()
    train_stream, val_stream = corpus.split(VAL_FRACTION)
    widths = {"dense": settings.intermediate_size, "memory": matched_width(settings)}
    results = {}
    for kind, width in widths.items():
        model = build(settings, width, with_memory=kind == "memory")
        result = results[kind] = train(settings, model, train_stream, val_stream)
        report(
            f"seed {settings.seed} {kind:6} {result.active_parameters:,} parameters active, "
            f"{result.total_parameters:,} in all: validation loss {result.first_val_loss:.4f} -> "
            f"{result.val_loss:.4f} nats a byte, {result.seconds:.0f} s"
        )
    # The model with memory is the last.
    text, same = saved_and_loaded(model, folder, new_tokens=64)
    report(f"seed {settings.seed} generates the same once loaded, and without a cache: {same}")
    return {
        "settings": dataclasses.asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "corpus_sha256": corpus.sha256,
        **{kind: dataclasses.asdict(result) for kind, result in results.items()},
        "generated": text.decode("latin-1"),
        "same_tokens": same,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="transformers_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--family", choices=FAMILIES, default=Settings.family)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--json", type=Path, help="write settings, losses and the text there")
    parser.add_argument("--out", type=Path, help="keep the last model with memory there")
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    records = []
    for seed in options.seeds:
        settings = Settings(family=options.family, seed=seed, steps=options.steps)
        with tempfile.TemporaryDirectory() as temporary:
            records.append(compare(settings, options.out or Path(temporary), print))
    print(records[-1]["generated"])
    if options.json is not None:
        write_atomically(
            options.json, lambda file: file.write(json.dumps(records, indent=1).encode())
        )
    return 0 if all(record["same_tokens"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
