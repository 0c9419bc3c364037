"""What save_pretrained writes of a model with memory, and from_pretrained makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ultramem_cuda as um

transformers = pytest.importorskip("transformers", minversion="5.0")
safetensors = pytest.importorskip("safetensors.torch")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers_cases import (  # noqa: E402
    MEMORY,
    decoder,
    enlarge_memory,
    generate,
    logits,
    loss_of,
)

from ultramem_cuda.integrations.transformers import add_memory, memory_model_class  # noqa: E402


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def assert_same(model: Any, other: Any) -> None:
    assert type(other) is type(model)
    assert other.config.ultramem == model.config.ultramem
    state, loaded = model.state_dict(), other.state_dict()
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Olmo", "Olmo2", "Gemma2"]
)
def test_loaded_model_generates_the_same(family: str, tmp_path: Path) -> None:
    model = enlarge_memory(add_memory(decoder(family), MEMORY))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        saved(model, tmp_path), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(model, loaded)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(generate(loaded), generate(model))


def test_config_is_plain_data(tmp_path: Path) -> None:
    model = add_memory(decoder(), MEMORY, layers=[0, 2], dtype=torch.bfloat16)
    data = json.loads((saved(model, tmp_path) / "config.json").read_text())
    assert data["model_type"] == "ultramem"
    assert data["architectures"] == ["UltraMemLlamaForCausalLM"]
    assert data["hidden_size"] == 24
    memory = data["ultramem"]
    assert (
        um.UltraMemConfig.from_dict(memory.pop("config")) == model.model.layers[0].mlp.memory.config
    )
    assert memory == {
        "version": 1,
        "base_model_type": "llama",
        "layers": [0, 2],
        "decoder_layers": "layers",
        "mlp": "mlp",
        "grad_mode": "dense",
        "table_dtype": "bfloat16",
    }
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_another_process_needs_the_import_alone(tmp_path: Path) -> None:
    model = enlarge_memory(add_memory(decoder("Qwen2"), MEMORY))
    saved(model, tmp_path)
    program = """
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "ultramem" in str(error), error
else:
    sys.exit("loaded without memory layers")
import ultramem_cuda.integrations.transformers
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(1, 9)[None]).logits.detach(), sys.argv[2])
"""
    output = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", program, str(tmp_path), str(output)], check=True)
    expected = model(torch.arange(1, 9)[None]).logits
    assert torch.equal(torch.load(output), expected)


def test_deferred_table_with_scale(tmp_path: Path) -> None:
    model = enlarge_memory(add_memory(decoder(), MEMORY, grad_mode="deferred")).train()

    def train(model: Any) -> list[float]:
        optimizer = um.optim.MemorySGD(model.parameters(), lr=0.5, weight_decay=0.3)
        losses = []
        for _ in range(3):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    train(model)
    assert 0.5 < model.memory_table.scale[0] < 1.0
    loss_of(model).backward()  # what is pending is no part of a checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    model.zero_grad()
    assert loaded.memory_table.grad_mode == "deferred"
    assert loaded.memory_table.scale.dtype == torch.float64
    assert loaded.memory_table.factors.num_tokens == 0
    assert_same(model, loaded)
    assert torch.equal(generate(loaded), generate(model.eval()))
    assert train(loaded.train()) == train(model.train())
    assert_same(model, loaded)


def test_loaded_in_another_dtype(tmp_path: Path) -> None:
    model = add_memory(decoder(), MEMORY, grad_mode="deferred")
    with torch.no_grad():
        model.memory_table.scale.fill_(0.1)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.memory_table.scale, model.memory_table.scale)
    assert torch.equal(loaded.memory_table.values, model.memory_table.values.bfloat16())
    loss_of(loaded.train()).backward()
    assert loaded.memory_table.factors.dtype == torch.bfloat16


def test_float32_table_of_a_bfloat16_model(tmp_path: Path) -> None:
    model = add_memory(decoder().to(torch.bfloat16), MEMORY, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert loaded.memory_table.values.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert_same(model, loaded)


def test_permutation_is_loaded(tmp_path: Path) -> None:
    model = enlarge_memory(add_memory(decoder(), {**MEMORY, "shuffle": "permutation"}))
    state = model.state_dict()
    for name in state:
        if name.endswith("shuffle_index"):
            state[name] = state[name].flip(0)
    model.load_state_dict(state)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert_same(model, loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_tied_embeddings_and_shards(tmp_path: Path) -> None:
    model = add_memory(decoder(tie_word_embeddings=True), MEMORY)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(model, loaded)


def test_missing_weights_are_drawn_as_configured(tmp_path: Path) -> None:
    model = enlarge_memory(add_memory(decoder(), MEMORY, grad_mode="deferred"))
    weights = saved(model, tmp_path) / "model.safetensors"
    state = safetensors.load_file(weights)
    dropped = [
        name
        for name in state
        if name.endswith("memory_table.pre_values") or ".layers.1.mlp.memory." in name
    ]
    dropped.remove("model.layers.1.mlp.memory.cores")
    for name in dropped:
        del state[name]
    safetensors.save_file(state, weights, metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(dropped)
    for name, tensor in loaded.state_dict().items():
        if name in state:
            assert torch.equal(tensor, state[name]), name
    drawn, table = loaded.model.layers[1].mlp.memory, loaded.memory_table
    assert table.pre_values.std().item() == pytest.approx(table.init_std, rel=0.1)
    assert drawn.keys.std().item() == pytest.approx(MEMORY["key_dim"] ** -0.5, rel=0.1)
    assert drawn.query_proj.weight.std().item() == pytest.approx(MEMORY["key_dim"] ** -0.5, rel=0.1)
    assert torch.equal(drawn.key_norm, model.model.layers[0].mlp.memory.key_norm)
    assert not torch.equal(drawn.keys, model.model.layers[1].mlp.memory.keys)


def test_other_heads_and_the_base_model(tmp_path: Path) -> None:
    model = enlarge_memory(add_memory(decoder(), MEMORY))
    saved(model, tmp_path)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is memory_model_class(transformers.LlamaModel)
    for other in (head, base):
        assert torch.equal(other.memory_table.values, model.memory_table.values)
    hidden = base(torch.arange(1, 9)[None], output_hidden_states=True).hidden_states
    expected = model(torch.arange(1, 9)[None], output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))


def test_base_model_alone(tmp_path: Path) -> None:
    model = enlarge_memory(add_memory(decoder(head="Model"), MEMORY))
    assert len(model(torch.arange(1, 9)[None], output_hidden_states=True).hidden_states) == 4
    assert_same(model, transformers.AutoModel.from_pretrained(saved(model, tmp_path)))


def test_mixture_of_experts(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    plain = decoder("Qwen3Moe", **sizes)
    plain.save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    enlarge_memory(add_memory(model, MEMORY))
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "memory"))
    assert_same(model, loaded)
    assert loaded.config._experts_implementation == plain.config._experts_implementation
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("what", ["missing", "version", "family"])
def test_damaged_configuration(what: str, tmp_path: Path) -> None:
    file = saved(add_memory(decoder(), MEMORY), tmp_path) / "config.json"
    data = json.loads(file.read_text())
    match = {
        "missing": "'ultramem' must hold",
        "version": "has version 99",
        "family": "model type 'no-such'",
    }[what]
    if what == "missing":
        del data["ultramem"]
    elif what == "version":
        data["ultramem"]["version"] = 99
    else:
        data["ultramem"]["base_model_type"] = "no-such"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_scale_has_no_place_in_a_dense_table(tmp_path: Path) -> None:
    model = add_memory(decoder(), MEMORY, grad_mode="deferred")
    file = saved(model, tmp_path) / "config.json"
    data = json.loads(file.read_text())
    data["ultramem"]["grad_mode"] = "dense"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"memory_table\.scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
