"""The probes pass a GPT, and catch a model that cheats."""

import pytest
import torch

from pgl.evaluate import probe


class LooksAhead(torch.nn.Module):
    """Its scores get better the more often the target comes later in the window."""

    def __init__(self, gpt) -> None:
        super().__init__()
        self.gpt = gpt

    def token_losses(self, ids_BT, targets_BT, last=None):
        return self.gpt.token_losses(ids_BT, targets_BT, last) - 0.01 * ids_BT[:, -1:]


class ReadsItsTarget(LooksAhead):
    """A mask that is off by one: position p reads token p + 1, its own target."""

    def token_losses(self, ids_BT, targets_BT, last=None):
        logits_BTV = self.gpt(ids_BT).clone()
        logits_BTV[:, :-1].scatter_add_(
            2, ids_BT[:, 1:, None].long(), torch.full(ids_BT[:, 1:, None].shape, 3.0)
        )
        nats_BT = -logits_BTV.log_softmax(-1).gather(2, targets_BT[:, :, None].long())[..., 0]
        return nats_BT[:, -(last or nats_BT.shape[1]) :]


class LooksAheadInBatches(LooksAhead):
    """Its cheat is in the computation of the last positions only."""

    def token_losses(self, ids_BT, targets_BT, last=None):
        cheat = LooksAhead if last is not None else type(self.gpt)
        return cheat.token_losses(self if last is not None else self.gpt, ids_BT, targets_BT, last)


class TooSure(LooksAhead):
    def token_losses(self, ids_BT, targets_BT, last=None):
        return self.gpt.token_losses(ids_BT, targets_BT, last) - 0.1


class Deaf(LooksAhead):
    def token_losses(self, ids_BT, targets_BT, last=None):
        return torch.full(ids_BT.shape, 32.0).log()


def window(stream, length=33):
    return torch.from_numpy(stream(length).astype("int32"))


@pytest.mark.parametrize("length", [3, 4, 33])
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_gpt_passes(make_gpt, stream, length, document_mask):
    probes = probe(make_gpt(document_mask=document_mask).eval(), window(stream, length), 32)

    assert probes.causal
    assert probes.normalised
    assert probes.window.first == (length - 1) // 2
    assert probes.window.before == 0 < probes.window.after
    assert probes.scored is None
    assert probes.probability_error < 1e-5


@pytest.mark.parametrize("last", [2, 5, 32])
@pytest.mark.parametrize("batch_windows", [1, 2, 4])
def test_a_gpt_passes_as_it_is_scored(make_gpt, stream, last, batch_windows):
    shapes = []

    def losses(gpt, ids_BT, targets_BT, last):
        shapes.append((tuple(ids_BT.shape), tuple(targets_BT.shape), last))
        assert ids_BT.is_contiguous()
        assert targets_BT.is_contiguous()
        return gpt.token_losses(ids_BT, targets_BT, last)

    probes = probe(
        make_gpt().eval(),
        window(stream),
        32,
        losses=losses,
        last=last,
        batch_windows=batch_windows,
    )

    assert probes.causal
    assert probes.scored.first == 32 - last + last // 2
    assert probes.scored.before < 1e-6
    assert probes.scored.after > 1e-3
    shape = (batch_windows, 32)
    assert shapes == [(shape, shape, last)] * (2 if batch_windows == 1 else 1)


def test_cheats_do_not(make_gpt, stream):
    gpt = make_gpt().eval()
    assert not probe(LooksAhead(gpt), window(stream), 32).causal
    assert not probe(ReadsItsTarget(gpt), window(stream), 32).causal
    assert not probe(ReadsItsTarget(gpt), window(stream), 32, last=8).scored.causal
    in_batches = probe(LooksAheadInBatches(gpt), window(stream), 32, last=8)
    assert in_batches.window.causal
    assert not in_batches.causal
    sure = probe(TooSure(gpt), window(stream), 32)
    assert sure.causal
    assert not sure.normalised
    assert sure.probability_error == pytest.approx(2.718281828**0.1 - 1, rel=1e-3)


def test_a_probe_that_tests_nothing_does_not_pass(make_gpt, stream):
    probes = probe(Deaf(make_gpt()), window(stream), 32)
    assert probes.normalised
    assert not probes.causal
