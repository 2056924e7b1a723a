"""Score-first test-time training against #549's: losses, norms and weights, step by step."""

import numpy as np
import pytest
import torch

from pgl.evaluate import BitsPerByte, ByteTable, TTTConfig, score_first_ttt, sliding_windows
from pgl.evaluate.ttt import assign_chunks, chunk_lr
from pgl.model import GPT, GPTConfig

LAYERS = 11


@pytest.fixture
def reference(golden):
    return golden("ttt")


def unbanked(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per-layer names for the reference's stacks of matrices."""
    out = {name: value for name, value in parameters.items() if not name.endswith("_bank")}
    for i in range(LAYERS):
        block = f"blocks.{i}"
        out[f"{block}.attn.c_q.weight"] = parameters["qo_bank"][i]
        out[f"{block}.attn.proj.weight"] = parameters["qo_bank"][LAYERS + i]
        out[f"{block}.attn.c_k.weight"] = parameters["kv_bank"][i]
        out[f"{block}.attn.c_v.weight"] = parameters["kv_bank"][LAYERS + i]
        out[f"{block}.mlp.fc.weight"] = parameters["mlp_up_bank"][i]
        out[f"{block}.mlp.proj.weight"] = parameters["mlp_down_bank"][i]
    return out


def banked(gpt: GPT) -> dict[str, torch.Tensor]:
    """The model's parameters under the reference's names."""
    state = {name: value.detach().double().clone() for name, value in gpt.named_parameters()}

    def stack(*names: str) -> torch.Tensor:
        return torch.stack(
            [state.pop(f"blocks.{i}.{name}.weight") for name in names for i in range(LAYERS)]
        )

    state["qo_bank"] = stack("attn.c_q", "attn.proj")
    state["kv_bank"] = stack("attn.c_k", "attn.c_v")
    state["mlp_up_bank"] = stack("mlp.fc")
    state["mlp_down_bank"] = stack("mlp.proj")
    return state


def build(reference) -> GPT:
    gpt = GPT(
        GPTConfig(
            vocab_size=64,
            num_layers=LAYERS,
            model_dim=32,
            num_heads=4,
            num_kv_heads=2,
            mlp_hidden=64,
            mlp_activation="leaky_relu2",
            rope_dims=4,
            smear_gate=True,
            bigram_buckets=97,
            bigram_dim=16,
            value_embedding_layers=[9, 10],
            value_embedding_dim=8,
            ln_scale=True,
            xsa_last_layers=4,
        )
    )
    start = {name[6:]: value for name, value in reference.items() if name.startswith("param/")}
    state = {name: torch.from_numpy(np.array(value)) for name, value in unbanked(start).items()}
    gpt.load_state_dict(state)
    return gpt


def frozen_in_reference(name: str) -> bool:
    # The reference freezes by the names of its own parameters; its matrices lie in banks.
    is_matrix = name.endswith(".weight")
    return name.startswith(("blocks.0.", "blocks.1.")) and not is_matrix


def test_windows_and_learning_rates(reference):
    chunk_tokens, seq_len = int(reference["chunk_tokens"]), int(reference["seq_len"])
    windows_W3 = sliding_windows(683, seq_len, int(reference["stride"]), tail="pr236")

    np.testing.assert_array_equal(windows_W3[:, 0], reference["window_start"])
    np.testing.assert_array_equal(
        assign_chunks(windows_W3, chunk_tokens), reference["window_chunk"]
    )
    config = TTTConfig(lr=float(reference["ttt_lr"]))
    rates = [chunk_lr(config, chunk, 6) for chunk in range(6)]
    np.testing.assert_allclose(rates, reference["lr_per_chunk"], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(("freeze", "micro_batch_seqs"), [("freeze0", 32), ("freeze2", 2)])
def test_trajectory(reference, freeze, micro_batch_seqs):
    gpt = build(reference)
    table = ByteTable(
        torch.from_numpy(reference["base_bytes"]),
        torch.from_numpy(reference["has_leading_space"]),
        torch.from_numpy(reference["is_boundary"]),
        "golden",
        "",
    )
    config = TTTConfig(
        chunk_tokens=int(reference["chunk_tokens"]),
        lr=float(reference["ttt_lr"]),
        epochs=int(reference["ttt_epochs"]),
        momentum=float(reference["ttt_momentum"]),
        grad_clip_norm=float(reference["ttt_grad_clip"]),
        batch_seqs=int(reference["ttt_batch_seqs"]),
        micro_batch_seqs=micro_batch_seqs,
    )
    start, records, states = banked(gpt), [], []

    def keep(record):
        records.append(record)
        states.append(banked(gpt))

    scores = score_first_ttt(
        gpt,
        reference["val_tokens"],
        BitsPerByte(table),
        config,
        seq_len=int(reference["seq_len"]),
        stride=int(reference["stride"]),
        tail="pr236",
        trainable=None if freeze == "freeze0" else lambda name: not frozen_in_reference(name),
        on_chunk=keep,
    )

    assert_close = np.testing.assert_allclose
    assert_close([float(r.nats) for r in records], reference[f"chunk_loss_sum_{freeze}"], rtol=1e-5)
    assert [int(r.tokens) for r in records] == reference["chunk_token_count"].tolist()
    assert [int(r.bytes) for r in records] == reference["chunk_byte_count"].tolist()
    losses = [float(loss) for r in records for loss in r.step_losses]
    assert_close(losses, reference[f"train_step_loss_{freeze}"], rtol=1e-5)
    norms = [float(norm) for r in records for norm in r.grad_norms]
    assert_close(norms, reference[f"train_step_grad_norm_{freeze}"], rtol=1e-5)
    steps = [r.chunk for r in records for _ in r.step_losses]
    assert steps == reference[f"train_step_chunk_{freeze}"].tolist()
    assert_close(float(scores["loss"]), reference[f"val_loss_{freeze}"], rtol=1e-5)
    assert_close(float(scores["bpb"]), reference[f"val_bpb_{freeze}"], rtol=1e-5)
    for column, name in enumerate(reference["checksum_names"].tolist()):
        l2 = [float(state[name].norm()) for state in states]
        moved = [float((state[name] - start[name]).norm()) for state in states]
        assert_close(l2, reference[f"param_l2_after_chunk_{freeze}"][:, column], rtol=1e-5)
        expected = reference[f"param_delta_l2_after_chunk_{freeze}"][:, column]
        assert_close(moved, expected, rtol=1e-3, atol=1e-7)
    assert_close(
        states[-1]["tok_emb.weight"], reference[f"final_tok_emb_{freeze}"], rtol=1e-4, atol=1e-5
    )
    assert_close(
        states[-1]["qo_bank"][0], reference[f"final_qo_bank0_{freeze}"], rtol=1e-4, atol=1e-5
    )
