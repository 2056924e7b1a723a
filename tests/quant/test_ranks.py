"""Two processes: each quantises its share, both get all, an error reaches both; averages."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pgl.quant import (
    Calibration,
    GPTQConfig,
    QuantConfig,
    StateQuantizer,
    TensorRule,
    average_over_ranks,
    calibrated,
)
from pgl.quant.ranks import share_out


def test_one_process_does_everything_itself():
    assert share_out(["b", "a"], lambda names: {n: n * 2 for n in reversed(names)}) == {
        "b": "bb",
        "a": "aa",
    }


def test_one_process_keeps_its_own_statistics():
    hessian = torch.ones(2, 2)
    average_over_ranks({"a": hessian})
    assert torch.equal(hessian, torch.ones(2, 2))


def problem():
    generator = torch.Generator().manual_seed(0)
    weights, hessians, energies = {}, {}, {}
    for layer in range(3):
        for name, shape in (("attn.c_q", (16, 16)), ("mlp.fc", (24, 16)), ("mlp.proj", (16, 24))):
            name = f"blocks.{layer}.{name}.weight"
            x = torch.randn(99, shape[1], generator=generator)
            weights[name] = torch.randn(shape, generator=generator) * 0.3
            hessians[name] = x.T @ x
            energies[name] = torch.rand(shape[0], generator=generator)
    weights["tok_emb.weight"] = torch.randn(20, 16, generator=generator)
    return weights, Calibration(hessians, energies)


def quantise(steps):
    weights, calibration = problem()
    rule = TensorRule(method="gptq")
    config = QuantConfig(rule, rule, passthrough_max_numel=0, gptq=GPTQConfig(steps=steps))
    quantizer = StateQuantizer(weights, config, calibration)
    return [quantizer(factor) for factor in (1.0, 1.7)]


def work(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    coded = []
    code_columns = calibrated.search_codes

    def counted(w_KRC, *rest):
        coded.append(len(w_KRC))
        return code_columns(w_KRC, *rest)

    calibrated.search_codes = counted
    stored = quantise("grid")
    results[f"coded{rank}"] = sum(coded)
    calibrated.search_codes = code_columns
    results[f"grid{rank}"] = stored
    results[f"balanced{rank}"] = quantise("balanced")

    def fails_on_rank_one(names):
        if dist.get_rank() == 1:
            raise ValueError("the second process gives up")
        return dict.fromkeys(names)

    try:
        share_out(["a", "b", "c"], fails_on_rank_one)
    except ValueError as error:
        results[f"error{rank}"] = str(error)
    shared, own = torch.full((2, 2), float(rank)), torch.tensor([1.0, 5.0 * rank])
    average_over_ranks({"q": shared, "k": shared, "v": own})
    results[f"average{rank}"] = shared, own
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree_with_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (port, results), nprocs=2)
        assert results["coded0"] == 2 * 5  # of nine matrices, at two factors
        assert results["coded1"] == 2 * 4
        for steps in ("grid", "balanced"):
            alone = quantise(steps)
            for rank in range(2):
                for expected, found in zip(alone, results[f"{steps}{rank}"], strict=True):
                    assert list(found) == list(expected)
                    for name, tensor in expected.items():
                        assert tensor.kind == found[name].kind
                        assert torch.equal(tensor.data, found[name].data)
                        assert torch.equal(tensor.scale_R, found[name].scale_R)
        for rank in range(2):
            assert results[f"error{rank}"] == "the second process gives up"
            shared, own = results[f"average{rank}"]
            assert torch.equal(shared, torch.full((2, 2), 0.5))
            assert own.tolist() == [1.0, 2.5]
