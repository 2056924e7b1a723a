"""Scores of two processes are those of one: unequal shares, empty shares, test-time training."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pgl.evaluate import (
    BitsPerByte,
    ByteTable,
    TTTConfig,
    WindowLoader,
    evaluate_windows,
    score_first_ttt,
    train_on_all,
)
from pgl.model import GPT, GPTConfig

WORLD_SIZE = 2
TABLE = ByteTable(
    torch.tensor([0, 0, 1, 2, 3, 4, 5, 1], dtype=torch.int16),
    torch.tensor([False, False, True, True, False, False, True, True]),
    torch.tensor([True, True] + [False] * 6),
    "eight ids",
    "",
)
SEQ_LEN, STRIDE = 8, 4
# 3 sequences of 8 in a chunk: a batch of 2, shared equally, and one of 1, which rank 1 gets.
CONFIG = TTTConfig(chunk_tokens=24, lr=0.05, epochs=2, batch_seqs=2)


def make_gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig(
            vocab_size=8, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, mlp_hidden=16
        )
    )
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gpt


def make_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 8, 103, dtype=np.uint16)


def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for count in (11, 400, 37):
        ids = torch.randint(8, (count + 1,), generator=generator)
        out.append((torch.rand(count, generator=generator), ids[:-1], ids[1:]))
    return out


def metric_of(some_batches) -> dict[str, torch.Tensor]:
    metric = BitsPerByte(TABLE)
    for batch in some_batches:
        metric.update(*batch)
    return metric.compute()


def everything(rank: int, world_size: int) -> dict:
    """What each process computes; alone, it is the expected result."""
    gpt, tokens = make_gpt(), make_tokens()
    loader = WindowLoader(
        tokens, seq_len=SEQ_LEN, stride=STRIDE, batch_windows=4, rank=rank, world_size=world_size
    )
    out = {
        "unequal": metric_of(batches()[: 2 if rank == 0 else 3][2 * rank :])
        if world_size > 1
        else metric_of(batches()),
        "one has nothing": metric_of(batches() if rank == 0 else []),
        "windows": evaluate_windows(gpt, loader, BitsPerByte(TABLE)),
    }
    records = []
    out["ttt"] = score_first_ttt(
        gpt,
        tokens,
        BitsPerByte(TABLE),
        CONFIG,
        seq_len=SEQ_LEN,
        stride=STRIDE,
        batch_windows=4,
        on_chunk=records.append,
    )
    out["ttt steps"] = [
        [float(value) for record in records for value in record.step_losses],
        [float(value) for record in records for value in record.grad_norms],
    ]
    out["chunk tokens"] = [int(record.tokens) for record in records]
    out["ttt weights"] = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    gpt = make_gpt()
    out["all"] = train_on_all(gpt, tokens, CONFIG, seq_len=SEQ_LEN, allow_illegal=True)
    out["all weights"] = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    return out


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    try:
        torch.save(everything(rank, WORLD_SIZE), Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_two_processes_score_what_one_does(tmp_path, monkeypatch):
    # A started process imports the worker by name, whatever name pytest gave this module.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    mp.spawn(importlib.import_module("test_bpb_ddp").worker, (str(tmp_path),), nprocs=WORLD_SIZE)

    alone = everything(0, 1)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]

    for result in ranks:
        for part in ("unequal", "one has nothing", "windows", "ttt"):
            # Float32 sums of other batches: as exact as the model, not more.
            tolerance = 1e-12 if part in ("unequal", "one has nothing") else 1e-6
            torch.testing.assert_close(result[part], alone[part], rtol=tolerance, atol=0)
        np.testing.assert_allclose(result["ttt steps"], alone["ttt steps"], rtol=1e-5)
        torch.testing.assert_close(result["all"], alone["all"], rtol=1e-5, atol=0)
        for part in ("ttt weights", "all weights"):
            torch.testing.assert_close(result[part], alone[part], rtol=1e-4, atol=1e-6)
            for name, weight in result[part].items():
                assert torch.equal(weight, ranks[0][part][name]), f"{name} differs between ranks"
    shares = np.array([result["chunk tokens"] for result in ranks])
    assert shares.sum(axis=0).tolist() == alone["chunk tokens"]
    assert (shares.sum(axis=1) > 0).all()
