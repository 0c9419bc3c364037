"""Slot-usage statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from module_cases import layer_and_table, reference_config, reference_parameters, to_numpy, tokens

from ultramem_cuda import python_ref as ref
from ultramem_cuda import stats


def test_counts_are_those_of_the_slots_read() -> None:
    layer, table = layer_and_table(torch.float64, layer_index=2, num_heads=2, key_expand=2)
    x = tokens(9, 24, dtype=torch.float64)
    with stats.collect_usage(layer) as usage:
        layer(x[:4], table)
        layer(x[4:], table)
    output = ref.memory_layer(
        to_numpy(x), reference_parameters(layer, table), reference_config(layer)
    )
    slot, _ = layer.addressing.slots(torch.from_numpy(output.indices))
    expected = np.bincount(slot.numpy().ravel(), minlength=250)
    table_counts = usage[""].table_counts()
    np.testing.assert_array_equal(table_counts.numpy(), expected)
    summary = usage[""].summary()
    assert summary.num_slots == 36
    assert summary.reads == 9 * 2 * 7
    assert summary.distinct == np.count_nonzero(expected)


def test_key_counts_are_those_of_the_keys_kept() -> None:
    layer, table = layer_and_table(torch.float64, num_heads=2)
    x = tokens(9, 24, dtype=torch.float64)
    with stats.collect_key_usage(layer) as usage, stats.collect_usage(layer) as slots:
        layer(x[:4], table)
        layer(x[4:], table)
    assert layer.key_usage is None
    assert slots[""].summary().reads == 9 * 2 * 7
    parameters = reference_parameters(layer, table)
    query = ref.tucker_query(to_numpy(x), parameters.query_proj, parameters.query_norm, 2)
    selection = ref.product_key_topk(
        query,
        ref.rms_norm(parameters.keys, parameters.key_norm),
        parameters.cores,
        topk=layer.config.topk,
        axis_topk=layer.config.kept_per_axis,
    )
    for side, summary in enumerate(usage[""].summaries()):
        expected = np.bincount(selection.axis_indices[:, :, side].ravel(), minlength=12)
        np.testing.assert_array_equal(usage[""].counts[side].numpy(), expected)
        assert summary.num_slots == 12
        assert summary.reads == 9 * 2 * 5


def test_key_counts_of_what_no_axis_keeps() -> None:
    usage = stats.KeyUsage(4)
    usage.update(torch.tensor([[[[0, 3]], [[3, 1]]]]).movedim(1, 2).to(torch.int32))
    usage.update(torch.tensor([-1, 4, 4, 2]).view(1, 1, 2, 2))
    assert usage.counts.tolist() == [[1, 0, 0, 1], [0, 1, 1, 1]]
    # The one other device that every machine has.
    usage.update(torch.zeros(1, 1, 2, 2, dtype=torch.int32, device="meta"))
    assert usage.counts.is_meta


def test_only_kept_keys_are_counted() -> None:
    with pytest.raises(
        TypeError, match=r"axis_indices: must be int32 or int64, got torch\.float32"
    ):
        stats.KeyUsage(4).update(torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match=r"axis_indices: must have shape \[T, H, 2, m\], got"):
        stats.KeyUsage(4).update(torch.zeros(3, 2, 2, dtype=torch.int64))


def test_summary_of_known_counts() -> None:
    summary = stats.summarize_counts(torch.tensor([6, 0, 2, 0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert (summary.num_slots, summary.reads, summary.distinct) == (4, 8, 2)
    assert summary.fraction_touched == 0.5
    assert summary.entropy == pytest.approx(entropy)
    assert summary.uniform_entropy == pytest.approx(math.log(4))
    assert summary.relative_entropy == pytest.approx(math.log(4) - entropy)
    assert summary.effective_slots == pytest.approx(math.exp(entropy))
    assert summary.top_share == 0.75


def test_even_use_and_no_use() -> None:
    even = stats.summarize_counts(torch.full((400,), 3))
    assert even.relative_entropy == pytest.approx(0.0, abs=1e-12)
    assert even.top_share == pytest.approx(0.01)
    assert even.effective_slots == pytest.approx(400)
    unused = stats.summarize_counts(torch.zeros(400, dtype=torch.int64))
    assert (unused.reads, unused.distinct, unused.fraction_touched) == (0, 0, 0.0)
    assert unused.relative_entropy == pytest.approx(math.log(400))


def test_collectors_come_and_go() -> None:
    layer, table = layer_and_table()
    model = torch.nn.ModuleDict({"memory": layer})
    assert layer.usage is None
    with stats.collect_usage(model) as outer:
        layer(tokens(3, 24), table)
        with stats.collect_usage(model) as inner:
            layer(tokens(2, 24), table)
        assert layer.usage is outer["memory"]
    assert layer.usage is None
    layer(tokens(5, 24), table)
    assert outer["memory"].summary().reads == 3 * 7
    assert inner["memory"].summary().reads == 2 * 7


def test_counts_and_shuffle_follow_the_indices_to_their_device() -> None:
    layer, _ = layer_and_table(shuffle="permutation", key_expand=2)
    usage = stats.SlotUsage(layer.addressing)
    usage.update(torch.arange(5))
    assert usage.counts.sum() == 5
    # The one other device that every machine has.
    usage.update(torch.arange(5, device="meta"))
    assert usage.counts.is_meta
    assert isinstance(usage.addressing.shuffle, torch.Tensor)
    assert usage.addressing.shuffle.is_meta


def test_only_integers_are_counted() -> None:
    layer, _ = layer_and_table()
    with pytest.raises(TypeError, match=r"indices: must be int32 or int64, got torch\.float32"):
        stats.SlotUsage(layer.addressing).update(torch.zeros(3))
    for counts in (torch.ones(2, 3, dtype=torch.int64), torch.ones(3), torch.ones(0).long()):
        with pytest.raises(ValueError, match="counts: must be an integer tensor"):
            stats.summarize_counts(counts)


@pytest.mark.gpu
def test_counts_across_a_move_inside_the_block() -> None:
    layer, table = layer_and_table()
    x = tokens(3, 24)
    with stats.collect_usage(layer) as usage:
        layer(x, table)
        layer.to("cuda")
        layer(x.cuda(), table.to("cuda"))
    assert usage[""].counts.is_cuda
    assert usage[""].summary().reads == 2 * 21


def test_counts_under_compile() -> None:
    layer, table = layer_and_table()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(tokens(3, 24), table)
    with stats.collect_usage(layer) as usage, stats.collect_key_usage(layer) as keys:
        compiled(tokens(3, 24), table)
    compiled(tokens(3, 24), table)
    with stats.collect_usage(layer) as eager, stats.collect_key_usage(layer) as eager_keys:
        layer(tokens(3, 24), table)
    assert usage[""].summary().reads == 21
    assert torch.equal(usage[""].counts, eager[""].counts)
    assert keys[""].summaries()[0].reads == 15
    assert torch.equal(keys[""].counts, eager_keys[""].counts)
