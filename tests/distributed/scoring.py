"""What the ranks of :mod:`test_score_equality` compute: sums of scores, by stride and batch."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from runs import rank_environment

from pgl.evaluate import BitsPerByte, ByteTable, ScoreMap, WindowLoader, evaluate_windows
from pgl.model import GPT, GPTConfig

SEQ_LEN, NUM_TOKENS = 32, 700
BATCHES, STRIDES = (1, 7, 32), (8, 32)


def sums(rank: int, world_size: int) -> dict[str, list[float]]:
    """Nats, targets and bytes of all ranks together, by stride and batch."""
    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig(
            vocab_size=64,
            num_layers=4,
            model_dim=64,
            num_heads=4,
            num_kv_heads=2,
            mlp_hidden=128,
            smear_gate=True,
            bigram_buckets=97,
            bigram_dim=16,
            xsa_last_layers=2,
        )
    )
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    id_V = torch.arange(64)
    table = ByteTable((id_V % 5).to(torch.int16), id_V % 2 == 1, id_V < 4, "made up", "")
    tokens = np.random.default_rng(0).integers(0, 64, NUM_TOKENS, dtype=np.uint16)
    found = {}
    for stride in STRIDES:
        for batch_windows in BATCHES:
            loader = WindowLoader(
                tokens,
                seq_len=SEQ_LEN,
                stride=stride,
                batch_windows=batch_windows,
                rank=rank,
                world_size=world_size,
            )
            score_map = ScoreMap(NUM_TOKENS - 1, SEQ_LEN)
            metric = BitsPerByte(table)
            result = evaluate_windows(gpt, loader, metric, on_scores=score_map.add)
            score_map.sum_over_ranks()
            assert (score_map.times() == 1).all()
            nats = float(result["loss"]) * int(result["tokens"])
            found[f"{stride} {batch_windows}"] = [
                nats,
                float(score_map.nats().sum()),
                int(result["tokens"]),
                int(result["bytes"]),
            ]
    return found


def score(folder: Path) -> None:
    """What each rank does."""
    rank, world_size = int(rank_environment["LOCAL_RANK"]), int(rank_environment["WORLD_SIZE"])
    port = rank_environment["MASTER_PORT"]
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    try:
        torch.save(sums(rank, world_size), folder / f"{world_size}.{rank}.pt")
    finally:
        dist.destroy_process_group()
