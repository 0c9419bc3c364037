"""add_memory: what a block then computes, training, copies, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import ultramem_cuda as um

transformers = pytest.importorskip("transformers", minversion="5.0")

from transformers_cases import MEMORY, decoder, generate, logits, loss_of, prompts  # noqa: E402

from ultramem_cuda.integrations.transformers import (  # noqa: E402
    FFNWithMemory,
    add_memory,
    memory_model_class,
)

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo", "Olmo2", "Gemma2")


def wrapped_mlps(model: nn.Module) -> list[FFNWithMemory]:
    return [module for module in model.modules() if isinstance(module, FFNWithMemory)]


def memory_layers(model: nn.Module) -> list[um.UltraMemLayer]:
    return [module for module in model.modules() if isinstance(module, um.UltraMemLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_added_to_the_mlp(family: str) -> None:
    plain = decoder(family)
    model = add_memory(copy.deepcopy(plain), MEMORY)
    assert len(memory_layers(model)) == 3
    assert not torch.equal(logits(model), logits(plain))
    # The plain model with memory added by hooks on its MLPs, of the input that they see.
    for block, wrapped in zip(plain.model.layers, wrapped_mlps(model), strict=True):
        block.mlp.register_forward_hook(
            lambda mlp, inputs, y, wrapped=wrapped: (
                y + wrapped.memory(inputs[0], model.memory_table)
            )
        )
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_without_output_changes_nothing(family: str) -> None:
    plain = decoder(family)
    model = add_memory(copy.deepcopy(plain), MEMORY)
    with torch.no_grad():
        for memory in memory_layers(model):
            memory.value_proj.weight.zero_()
    assert torch.equal(logits(model), logits(plain))
    for name, parameter in plain.named_parameters():
        own = model.get_parameter(name.replace(".mlp.", ".mlp.ffn."))
        assert torch.equal(own, parameter), name


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache(family: str) -> None:
    model = add_memory(decoder(family), MEMORY)
    assert torch.equal(generate(model, use_cache=True), generate(model, use_cache=False))


def test_model_and_table() -> None:
    plain = decoder()
    torch.manual_seed(1)
    model = add_memory(plain, MEMORY)
    assert model is plain
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert type(model) is memory_model_class(transformers.LlamaForCausalLM)
    assert model.memory_table is model.model.memory_table
    assert all(wrapped.table is model.memory_table for wrapped in wrapped_mlps(model))
    names = [name for name in model.state_dict() if "values" in name]
    assert names == ["model.memory_table.values", "model.memory_table.pre_values"]
    assert sum(p is model.memory_table.values for p in model.parameters()) == 1
    assert [layer.layer_index for layer in memory_layers(model)] == [0, 1, 2]
    assert not any(module.training for module in model.modules())
    hidden = model(prompts()[0], output_hidden_states=True).hidden_states
    assert len(hidden) == 4


def test_chosen_layers_and_table_dtype() -> None:
    model = add_memory(decoder(), MEMORY, layers=[0, 2], dtype=torch.bfloat16)
    found = [isinstance(block.mlp, FFNWithMemory) for block in model.model.layers]
    assert found == [True, False, True]
    assert model.memory_table.values.dtype == torch.bfloat16
    assert memory_layers(model)[0].keys.dtype == torch.float32
    assert memory_layers(model)[1].config.num_layers == 2
    assert logits(model).isfinite().all()


def test_dtype_of_the_model() -> None:
    model = add_memory(decoder().to(torch.bfloat16), MEMORY)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_config_forms() -> None:
    config = um.UltraMemConfig(d_model=24, num_layers=3, **MEMORY)
    for given in (config, config.to_dict(), MEMORY):
        model = add_memory(decoder(), given)
        assert memory_layers(model)[0].config == config
    preset = um.UltraMemConfig.preset("227M-1.2B")
    sizes = {"hidden_size": preset.d_model, "num_hidden_layers": preset.num_layers}
    with torch.device("meta"):
        model = add_memory(decoder(**sizes), "227M-1.2B")
    assert memory_layers(model)[-1].config == preset


def test_configuration_of_other_models_stays() -> None:
    plain = decoder()
    config = plain.config
    before = config.to_dict()
    model = add_memory(copy.copy(plain), MEMORY)
    assert config.to_dict() == before
    assert type(config) is transformers.LlamaConfig
    assert model.config.ultramem["config"]["num_keys"] == MEMORY["num_keys"]
    shared = [m.config for m in model.modules() if getattr(m, "config", None) is not None]
    assert not any(config is other for other in shared)


def test_from_config_makes_new_memory() -> None:
    config = add_memory(decoder(), MEMORY).config
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert isinstance(model, memory_model_class(transformers.LlamaForCausalLM))
    table = um.MemoryTable.from_config(memory_layers(model)[0].config)
    assert model.memory_table.values.std().item() == pytest.approx(table.init_std, rel=0.1)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_a_table_of_their_own(way: str) -> None:
    model = add_memory(decoder(), MEMORY, grad_mode="deferred")
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model)
    assert type(other.config) is type(model.config)
    assert other.memory_table is not model.memory_table
    assert all(wrapped.table is other.memory_table for wrapped in wrapped_mlps(other))
    assert torch.equal(logits(other), logits(model))
    loss_of(other).backward()
    assert other.memory_table.factors.num_tokens > 0
    assert model.memory_table.factors.num_tokens == 0


def test_moves_keep_one_table() -> None:
    model = add_memory(decoder(), MEMORY).to(torch.float64)
    assert all(wrapped.table is model.memory_table for wrapped in wrapped_mlps(model))
    assert model.memory_table.values.dtype == torch.float64
    assert logits(model).dtype == torch.float64


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_training(grad_mode: str) -> None:
    torch.manual_seed(0)
    model = add_memory(decoder(), MEMORY, grad_mode=grad_mode).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = um.optim.MemoryAdam(um.optim.param_groups(model, lr=1e-2), weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = loss_of(model)
        loss.backward()
        um.optim.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def test_deferred_training_is_dense_training() -> None:
    dense = add_memory(decoder(), MEMORY).train()
    deferred = add_memory(decoder(), MEMORY, grad_mode="deferred").train()
    deferred.load_state_dict(dense.state_dict())
    for model in (dense, deferred):
        loss_of(model).backward()
    values, pre_values = deferred.memory_table.factors.to_dense()
    assert deferred.memory_table.values.grad is None
    torch.testing.assert_close(values, dense.memory_table.values.grad)
    torch.testing.assert_close(pre_values, dense.memory_table.pre_values.grad)


def test_zero_grad_of_the_model_clears_the_table() -> None:
    model = add_memory(decoder(), MEMORY, grad_mode="deferred").train()
    loss_of(model).backward()
    assert model.memory_table.factors.num_tokens > 0
    model.zero_grad()
    assert model.memory_table.factors.num_tokens == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_gradient_checkpointing(grad_mode: str) -> None:
    penalties = {"tucker_penalty": 1e-2, "key_balance": 1e-2}
    model = add_memory(decoder(), {**MEMORY, **penalties}, grad_mode=grad_mode).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        (loss_of(model) + sum(um.losses.collect_aux_losses(model).values())).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if grad_mode == "deferred":
            grads += model.memory_table.factors.to_dense()
        return grads

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    checkpointed = gradients()
    assert len(plain) == len(checkpointed)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_graph_breaks() -> None:
    model = add_memory(decoder(), MEMORY)
    ids, _ = prompts()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_embeddings_can_be_resized() -> None:
    model = add_memory(decoder(tie_word_embeddings=True), MEMORY)
    expected = logits(model)
    model.resize_token_embeddings(70)
    assert logits(model).shape[-1] == 70
    assert torch.equal(logits(model)[..., :64], expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- what is refused -----------------------------------------------------------------------------


def refused(model: Any, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
    """add_memory raises and leaves the model alone."""
    keys, kind, config = list(model.state_dict()), type(model), model.config
    with pytest.raises(error, match=match):
        add_memory(model, *(args or (MEMORY,)), **kwargs)
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert model.config is config


def test_families_without_an_mlp() -> None:
    refused(decoder("GPT2", "LMHeadModel"), ValueError, "no list of blocks at 'layers'.*there: 'h'")
    opt = decoder("OPT", word_embed_proj_dim=24, ffn_dim=40)
    refused(opt, ValueError, r"decoder_layers: .*there: 'decoder\.layers'")
    refused(
        opt,
        ValueError,
        r"mlp: OPTDecoderLayer has no module 'mlp'; its modules: .*fc1, fc2",
        decoder_layers="decoder.layers",
    )


def test_family_with_a_mapping() -> None:
    plain = decoder("GPT2", "LMHeadModel")
    blocks = len(plain.transformer.h)
    model = add_memory(plain, {**MEMORY, "num_slots": 2000}, decoder_layers="h")
    assert len(memory_layers(model)) == blocks
    assert torch.equal(generate(model, use_cache=True), generate(model, use_cache=False))


def test_mlp_that_returns_more_than_a_tensor() -> None:
    model = add_memory(decoder(), MEMORY)
    wrapped_mlps(model)[0].ffn = nn.LSTM(24, 24)
    with pytest.raises(TypeError, match="LSTM returned a tuple"):
        logits(model)


def test_wrong_arguments() -> None:
    model = decoder()
    refused(model, ValueError, "d_model must be 24.*got 32", {**MEMORY, "d_model": 32})
    three = {**MEMORY, "num_layers": 3}
    refused(model, ValueError, "num_layers must be 2.*got 3", three, layers=[0, 1])
    refused(model, ValueError, "d_model must be 24", "227M-1.2B")
    refused(model, ValueError, "name: must be one of", "7B")
    refused(model, ValueError, "heads: is not a field", {**MEMORY, "heads": 2})
    refused(model, TypeError, "config: must be an UltraMemConfig", 7)
    refused(model, ValueError, r"layers: must be in \[0, 3\)", layers=[1, 3])
    refused(model, ValueError, r"layers: must be in \[0, 3\)", layers=[-1])
    refused(model, ValueError, "layers: must be ascending", layers=[1, 0])
    refused(model, ValueError, "layers: must be ascending", layers=[])
    refused(model, ValueError, "grad_mode: must be 'dense' or 'deferred'", grad_mode="sparse")
    refused(model, ValueError, "dtype: must be a floating-point type", dtype=torch.int32)
    refused(add_memory(model, MEMORY), ValueError, "must have no memory layers yet")
    with pytest.raises(TypeError, match="model: must be a PreTrainedModel"):
        add_memory(nn.Linear(2, 2), MEMORY)  # type: ignore[type-var]
