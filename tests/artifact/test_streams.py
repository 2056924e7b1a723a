from dataclasses import replace

import pytest
import torch

from pgl.artifact.errors import ArtifactError
from pgl.artifact.streams import SCALES, from_streams, make_table, plan_streams, to_streams
from pgl.quant import StoredTensor


def test_round_trip_is_exact(tiny_stored):
    table = make_table(tiny_stored)
    streams = to_streams(table, tiny_stored)
    assert {name: len(data) for name, data in streams.items()} == {
        name: plan.num_bytes for name, plan in plan_streams(table).items()
    }
    restored = from_streams(table, streams)
    assert restored.keys() == tiny_stored.keys()
    for name, tensor in tiny_stored.items():
        other = restored[name]
        assert (other.group, other.kind, other.dtype) == (tensor.group, tensor.kind, tensor.dtype)
        assert other.data.dtype == tensor.data.dtype
        assert torch.equal(other.data, tensor.data)
        if tensor.scale_R is not None:
            assert torch.equal(other.scale_R, tensor.scale_R)


def test_order_does_not_depend_on_the_state_dict(tiny_stored):
    backwards = dict(reversed(tiny_stored.items()))
    assert make_table(backwards) == make_table(tiny_stored)


def test_the_same_matrix_of_all_layers_comes_together():
    codes = torch.zeros(2, 2, dtype=torch.int8)
    names = [f"blocks.{i}.attn.{m}.weight" for i in (10, 9, 1) for m in ("c_q", "c_k")]
    stored = {
        name: StoredTensor("attention", "int6", "float32", codes, torch.ones(2).half())
        for name in names
    }
    order = [entry.name for entry in make_table(stored)]
    layers = [1, 9, 10]
    assert order == [f"blocks.{i}.attn.{m}.weight" for m in ("c_k", "c_q") for i in layers]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_values_are_split_by_byte(kind):
    values = torch.tensor([1.0, -2.0, 3.5], dtype=getattr(torch, kind))
    stored = {"skip_weights": StoredTensor("control", kind, "float32", values)}
    table = make_table(stored)
    (data,) = to_streams(table, stored).values()
    plain = values.view(torch.uint8).reshape(3, -1)
    assert data == plain.T.contiguous().numpy().tobytes()
    (restored,) = from_streams(table, {f"control.{kind}": data}).values()
    assert torch.equal(restored.data, values)


def test_empty_and_scalar_tensors():
    stored = {
        "bigram.scale": StoredTensor("control", "float32", "float32", torch.tensor(0.25)),
        "nothing": StoredTensor("control", "float32", "float32", torch.zeros(0, 3)),
    }
    table = make_table(stored)
    restored = from_streams(table, to_streams(table, stored))
    assert restored["bigram.scale"].data.shape == ()
    assert restored["bigram.scale"].data == 0.25
    assert restored["nothing"].data.shape == (0, 3)


def test_bad_contents_are_refused(tiny_stored):
    name = next(n for n, t in tiny_stored.items() if t.kind == "int6")
    tensor = tiny_stored[name]
    beyond = {name: replace(tensor, data=torch.full_like(tensor.data, 40))}
    table = make_table(beyond)
    with pytest.raises(ArtifactError, match="codes beyond int6"):
        from_streams(table, to_streams(table, beyond))
    infinite = {name: replace(tensor, scale_R=tensor.scale_R * torch.inf)}
    with pytest.raises(ArtifactError, match=f"infinity in its stream {SCALES}"):
        from_streams(table, to_streams(table, infinite))
