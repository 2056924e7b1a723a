import math

import pytest
import torch

from pgl.evaluate import (
    BitsPerByte,
    FullTTTConfig,
    TTTConfig,
    WindowLoader,
    evaluate_windows,
    restored_weights,
    score_first_ttt,
    train_on_all,
)
from pgl.evaluate.adapt import sequence_loss
from pgl.evaluate.ttt import chunk_lr

SMALL = {"chunk_tokens": 40, "lr": 0.05, "epochs": 2, "batch_seqs": 2}


def run(gpt, table, tokens, config, **options):
    records = []
    settings = {"seq_len": 16, "stride": 8, "on_chunk": records.append} | options
    scores = score_first_ttt(gpt, tokens, BitsPerByte(table), config, **settings)
    return scores, records


def naive(gpt, tokens, config, num_chunks):
    """Chunk-by-chunk training with full-batch gradients, an SGD of three lines and no sharing."""
    params = list(gpt.parameters())
    velocity = [torch.zeros_like(p) for p in params]
    losses = []
    for chunk in range(num_chunks - 1):
        lr = config.lr * 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))
        start = chunk * config.chunk_tokens
        rows = [
            torch.from_numpy(tokens[i : i + 17].astype("int64"))
            for i in range(start, start + config.chunk_tokens - 15, 16)
        ]
        for _ in range(config.epochs):
            for first in range(0, len(rows), config.batch_seqs):
                batch = torch.stack(rows[first : first + config.batch_seqs])
                loss = gpt.token_losses(batch[:, :-1], batch[:, 1:]).mean()
                grads = torch.autograd.grad(loss, params)
                norm = torch.sqrt(sum(grad.square().sum() for grad in grads))
                scale = min(1.0, config.grad_clip_norm / float(norm))
                with torch.no_grad():
                    for p, v, grad in zip(params, velocity, grads, strict=True):
                        v.mul_(config.momentum).add_(scale * grad)
                        p.sub_(lr * v)
                losses.append(float(loss.detach()))
    return losses


def test_training_is_that_of_the_naive_loop(make_gpt, small_table, stream):
    config, tokens = TTTConfig(**SMALL), stream(150)
    gpt, twin = make_gpt(), make_gpt()

    _, records = run(gpt, small_table, tokens, config)
    expected = naive(twin, tokens, config, num_chunks=4)

    losses = [float(loss) for record in records for loss in record.step_losses]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(
            parameter, twin.get_parameter(name), rtol=1e-3, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("tail", ["exact", "pr236", "pr388"])
def test_sums_of_the_chunks_make_the_score(make_gpt, small_table, stream, tail):
    scores, records = run(make_gpt(), small_table, stream(150), TTTConfig(**SMALL), tail=tail)

    assert [record.chunk for record in records] == [0, 1, 2, 3]
    nats, tokens = sum(r.nats for r in records), sum(r.tokens for r in records)
    assert float(nats / tokens) == pytest.approx(float(scores["loss"]), rel=1e-12)
    assert int(tokens) == int(scores["tokens"])
    assert int(sum(r.bytes for r in records)) == int(scores["bytes"])
    if tail == "exact":
        assert int(tokens) == 149
    assert [len(record.step_losses) for record in records] == [2, 2, 2, 0]
    assert [len(record.grad_norms) for record in records] == [2, 2, 2, 0]
    # Two sequences of 16 in a chunk of 40; the rule is about the chunk.
    assert [record.trained_targets for record in records] == [32, 32, 32, 0]
    assert [record.trained_before for record in records] == [0, 40, 80, 120]


def test_without_training_it_is_the_sliding_score(make_gpt, small_table, stream):
    gpt, tokens = make_gpt(), stream(150)
    loader = WindowLoader(tokens, seq_len=16, stride=8)
    expected = evaluate_windows(gpt, loader, BitsPerByte(small_table))

    scores, _ = run(gpt, small_table, tokens, TTTConfig(**SMALL | {"lr": 1e-30}))

    assert float(scores["bpb"]) == pytest.approx(float(expected["bpb"]), rel=1e-6)
    assert scores["bytes"] == expected["bytes"]


def test_it_learns_what_comes_again(make_gpt, small_table, stream):
    gpt, tokens = make_gpt(), stream(41)[:40].repeat(8).reshape(40, 8).T.reshape(-1)
    loader = WindowLoader(tokens, seq_len=16, stride=8)
    before = evaluate_windows(gpt, loader, BitsPerByte(small_table))

    scores, records = run(gpt, small_table, tokens, TTTConfig(**SMALL | {"epochs": 6}))

    assert scores["loss"] < before["loss"] - 0.3
    assert records[-2].nats < records[0].nats


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.02},
        {"epochs": 3},
        {"momentum": 0.0},
        {"grad_clip_norm": 0.1},
        {"batch_seqs": 1},
        {"chunk_tokens": 60},
        {"freeze_blocks": 2},
    ],
)
def test_every_setting_acts(make_gpt, small_table, stream, changes):
    losses = [
        float(run(make_gpt(), small_table, stream(150), TTTConfig(**settings))[0]["loss"])
        for settings in (SMALL, SMALL | changes)
    ]
    assert losses[0] != losses[1]


def test_micro_batches_change_nothing_but_their_size(make_gpt, small_table, stream):
    settings = SMALL | {"chunk_tokens": 80, "batch_seqs": 5}
    losses, sizes = [], {32: set(), 2: set()}
    for micro_batch_seqs, seen in sizes.items():

        def loss(gpt, ids_BS, targets_BS, seen=seen):
            seen.add(len(ids_BS))
            return sequence_loss(gpt, ids_BS, targets_BS)

        config = TTTConfig(**settings, micro_batch_seqs=micro_batch_seqs)
        scores, _ = run(make_gpt(), small_table, stream(250), config, loss=loss)
        losses.append(float(scores["loss"]))
        full = FullTTTConfig(epochs=1, batch_seqs=5, micro_batch_seqs=micro_batch_seqs)
        train_on_all(make_gpt(), stream(81), full, seq_len=16, allow_illegal=True, loss=loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert sizes == {32: {5}, 2: {2, 1}}


def test_frozen_blocks_stay_and_flags_come_back(make_gpt, small_table, stream):
    gpt = make_gpt()
    gpt.tok_emb.weight.requires_grad_(False)
    gpt.blocks[0].eval()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}

    run(gpt, small_table, stream(150), TTTConfig(**SMALL, freeze_blocks=2))

    for name, parameter in gpt.named_parameters():
        frozen = name.startswith(("blocks.0.", "blocks.1."))
        assert torch.equal(parameter, before[name]) == frozen, name
        assert parameter.requires_grad == (name != "tok_emb.weight")
        assert parameter.grad is None
    assert gpt.training
    assert not gpt.blocks[0].training


def test_a_predicate_chooses_the_parameters(make_gpt, small_table, stream):
    gpt = make_gpt()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}

    run(gpt, small_table, stream(150), TTTConfig(**SMALL), trainable=lambda n: n == "smear.gate")

    changed = [n for n, p in gpt.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["smear.gate"]


class CachingGPT(torch.nn.Module):
    """Keeps a table from its first forward, as a rotary cache does."""

    def __init__(self, gpt) -> None:
        super().__init__()
        self.gpt = gpt
        self.register_buffer("cache", None)

    def token_losses(self, ids_BT, targets_BT, last=None):
        if self.cache is None:
            self.cache = torch.ones(1)
        return self.gpt.token_losses(ids_BT, targets_BT, last) * self.cache


def test_it_runs_under_inference_mode(make_gpt, small_table, stream):
    tokens = stream(150)
    expected, _ = run(make_gpt(), small_table, tokens, TTTConfig(**SMALL))
    gpt, metric = CachingGPT(make_gpt()), BitsPerByte(small_table)

    with torch.inference_mode():
        evaluate_windows(gpt, WindowLoader(tokens, seq_len=16, stride=8), metric)
        assert gpt.cache.is_inference()
        scores = score_first_ttt(gpt, tokens, metric, TTTConfig(**SMALL), seq_len=16, stride=8)

    assert float(scores["loss"]) == float(expected["loss"])


def test_weights_made_under_inference_mode_are_refused(make_gpt, small_table, stream):
    with torch.inference_mode():
        gpt = make_gpt()
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        run(gpt, small_table, stream(150), TTTConfig(**SMALL))


def test_weights_are_restored(make_gpt, small_table, stream):
    gpt = make_gpt()
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    with restored_weights(gpt):
        run(gpt, small_table, stream(150), TTTConfig(**SMALL))
        assert not torch.equal(gpt.tok_emb.weight, before["tok_emb.weight"])
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_learning_rate_falls_along_half_a_cosine():
    config = TTTConfig(lr=2.0)
    assert [chunk_lr(config, chunk, 3) for chunk in range(3)] == pytest.approx([2.0, 1.0, 0.0])
    assert chunk_lr(config, 0, 1) == 2.0


def test_training_on_all_of_it_must_be_asked_for(make_gpt, stream):
    with pytest.raises(ValueError, match="set allow_illegal"):
        train_on_all(make_gpt(), stream(150), TTTConfig(), seq_len=16)


def test_training_on_all_of_it(make_gpt, small_table, stream):
    gpt, tokens = make_gpt(), stream(150)
    loader = WindowLoader(tokens, seq_len=16, stride=8)
    before = evaluate_windows(gpt, loader, BitsPerByte(small_table))
    config = TTTConfig(lr=0.05, epochs=12, batch_seqs=4)

    losses = train_on_all(gpt, tokens, config, seq_len=16, allow_illegal=True)

    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    after = evaluate_windows(gpt, loader, BitsPerByte(small_table))
    assert after["loss"] < before["loss"] - 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.02},
        {"epochs": 3},
        {"momentum": 0.0},
        {"grad_clip_norm": 0.1},
        {"batch_seqs": 2},
        {"freeze_blocks": 2},
    ],
)
def test_every_setting_of_training_on_all_of_it_acts(make_gpt, stream, changes):
    settings = {"lr": 0.05, "epochs": 2, "batch_seqs": 4}
    weights = []
    for config in (FullTTTConfig(**settings), FullTTTConfig(**settings | changes)):
        gpt = make_gpt()
        train_on_all(gpt, stream(150), config, seq_len=16, allow_illegal=True)
        weights.append(torch.cat([parameter.flatten() for parameter in gpt.parameters()]))
    assert not torch.equal(*weights)


def test_epoch_loss_is_the_mean_over_its_targets(make_gpt, stream):
    gpt, tokens = make_gpt(), stream(16 * 5 + 3)
    ids = torch.from_numpy(tokens[: 16 * 5 + 1].astype("int64"))
    expected = gpt.token_losses(ids[:-1].view(5, 16), ids[1:].view(5, 16)).mean().detach()
    config = TTTConfig(lr=1e-30, epochs=2, batch_seqs=2)

    losses = train_on_all(gpt, tokens, config, seq_len=16, allow_illegal=True)

    assert [float(loss) for loss in losses] == pytest.approx([float(expected)] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_seqs": 0}, "batch_seqs is 0"),
        ({"micro_batch_seqs": 0}, "micro_batch_seqs is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm is -1.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"freeze_blocks": -1}, "freeze_blocks is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TTTConfig(**changes)


def test_what_does_not_fit_is_refused(make_gpt, small_table, stream):
    gpt, tokens = make_gpt(), stream(50)
    with pytest.raises(ValueError, match="chunk_tokens is 15"):
        run(gpt, small_table, tokens, TTTConfig(chunk_tokens=15))
    with pytest.raises(ValueError, match="num_targets is 50"):
        run(gpt, small_table, tokens, TTTConfig(**SMALL), num_targets=50)
    with pytest.raises(ValueError, match="leaves no parameter"):
        run(gpt, small_table, tokens, TTTConfig(**SMALL), trainable=lambda name: False)
    with pytest.raises(ValueError, match="10 targets do not fill"):
        train_on_all(gpt, stream(11), TTTConfig(), seq_len=16, allow_illegal=True)
