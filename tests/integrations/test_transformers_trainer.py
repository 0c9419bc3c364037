"""Trainer of transformers on models with memory: checkpoints, and going on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ultramem_cuda as um

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers_cases import MEMORY, decoder, logits

from ultramem_cuda.integrations.transformers import add_memory


@pytest.mark.parametrize("grad_mode", ["dense", "deferred"])
def test_trainer_saves_and_resumes(grad_mode: str, tmp_path: Path) -> None:
    ids = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0 if grad_mode == "dense" else 0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def trainer() -> Any:
        torch.manual_seed(0)
        model = add_memory(decoder(), MEMORY, grad_mode=grad_mode)
        groups = um.optim.param_groups(model, lr=1e-2)
        kind = torch.optim.AdamW if grad_mode == "dense" else um.optim.MemoryAdam
        return Trainer(model, arguments, train_dataset=data, optimizers=(kind(groups), None))

    first = trainer()
    before = first.model.memory_table.values.detach().clone()
    first.train()
    losses = [float(entry["loss"]) for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(first.model.memory_table.values, before)
    first.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(loaded), logits(first.model.eval()))
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(logits(second.model.eval()), logits(first.model))
