import copy
import math
import pickle

import pytest
import torch
from torch import nn

from pgl.evaluate import BitsPerByte, RunningBPB


def batch(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    nats = torch.rand(count, generator=generator) * 8
    ids = torch.randint(4, 32, (count + 1,), generator=generator)
    return nats, ids[:-1], ids[1:]


def naive_score(table, nats, previous, target) -> float:
    bits = sum(nat / math.log(2) for nat in nats.double().tolist())
    return bits / int(table.target_bytes(previous, target).sum())


def test_score_is_bits_over_bytes(small_table):
    metric = BitsPerByte(small_table)
    nats, previous, target = batch(500)

    metric.update(nats.view(50, 10), previous.view(50, 10), target.view(50, 10))
    scores = metric.compute()

    assert float(scores["bpb"]) == pytest.approx(naive_score(small_table, *batch(500)), rel=1e-12)
    assert float(scores["loss"]) == pytest.approx(float(nats.double().mean()), rel=1e-12)
    assert int(scores["tokens"]) == 500
    assert {name: value.dtype for name, value in scores.items()} == {
        "bpb": torch.float64,
        "loss": torch.float64,
        "tokens": torch.int64,
        "bytes": torch.int64,
    }


def test_mask_leaves_targets_out_whatever_they_hold(small_table):
    metric, masked = BitsPerByte(small_table), BitsPerByte(small_table)
    nats, previous, target = batch(100)
    mask = torch.arange(100) % 3 == 0
    metric.update(nats[mask], previous[mask], target[mask])
    nats[~mask] = torch.tensor([math.nan, math.inf]).repeat(33)

    masked.update(nats, previous, target, mask)

    assert masked.compute() == metric.compute()


def test_sum_is_exact_where_float32_is_not(small_table):
    metric = BitsPerByte(small_table)
    nats, previous, target = batch(1)
    metric.update(nats + 2.0**30, previous, target)
    for _ in range(1000):
        metric.update(torch.full((1,), 0.25), previous, target)

    assert float(metric.nats) == float(nats + 2.0**30) + 250.0


@pytest.mark.parametrize(
    "cast",
    [
        nn.Module.half,
        nn.Module.float,
        nn.Module.bfloat16,
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.float16),
    ],
)
def test_sums_keep_dtype_and_value_when_the_module_is_cast(small_table, cast):
    module = nn.ModuleDict({"metric": BitsPerByte(small_table), "linear": nn.Linear(2, 2)})
    metric = module["metric"]
    metric.update(*batch(333))
    before = metric.nats.clone()

    cast(module)

    assert metric.nats.dtype == torch.float64
    assert torch.equal(metric.nats, before)
    metric.reset()
    metric.update(*batch(10))
    assert metric.nats.dtype == torch.float64
    assert metric.num_tokens.dtype == metric.num_bytes.dtype == torch.int64
    assert metric.base_bytes_V.dtype == torch.int16


def test_inference_mode_may_come_and_go(small_table):
    metric = BitsPerByte(small_table)
    with torch.inference_mode():
        metric.update(*batch(10, seed=1))
        metric.reset()
        metric.update(*batch(10, seed=2))
    metric.update(*batch(10, seed=3))
    nats = batch(10, seed=4)[0].requires_grad_()
    metric.update(nats, *batch(10, seed=4)[1:])

    assert int(metric.compute()["tokens"]) == 30
    assert not metric.nats.requires_grad


def test_nothing_scored_is_refused(small_table):
    metric = BitsPerByte(small_table)
    nats, previous, target = batch(10)
    metric.update(nats, previous, target, torch.zeros(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="nothing to score: 0 targets"):
        metric.compute()
    metric.update(nats, previous, torch.ones_like(target))
    with pytest.raises(ValueError, match="10 targets of 0 bytes"):
        metric.compute()


def test_checkpoints_hold_no_part_of_it(small_table):
    assert BitsPerByte(small_table).state_dict() == {}


def test_copies_are_independent(small_table):
    metric = BitsPerByte(small_table)
    metric.update(*batch(10))
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        twin.update(*batch(10, seed=1))
        assert int(twin.num_tokens) == 20
    assert int(metric.num_tokens) == 10


def test_the_running_score_is_one_batch_late(small_table):
    metric = BitsPerByte(small_table)
    running = RunningBPB(metric)
    metric.update(*batch(50, seed=1))
    assert math.isnan(running.read())
    after_one = float(metric.compute()["bpb"])
    metric.update(*batch(50, seed=2))
    metric._computed = None
    after_two = float(metric.compute()["bpb"])
    assert [running.read(), running.read()] == pytest.approx([after_one, after_two], rel=1e-12)
