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
    assert probes.changed_from == (length - 1) // 2 + 1
    assert probes.change_before == 0 < probes.change_after
    assert probes.probability_error < 1e-5


def test_cheats_do_not(make_gpt, stream):
    gpt = make_gpt().eval()
    assert not probe(LooksAhead(gpt), window(stream), 32).causal
    sure = probe(TooSure(gpt), window(stream), 32)
    assert sure.causal
    assert not sure.normalised
    assert sure.probability_error == pytest.approx(2.718281828**0.1 - 1, rel=1e-3)


def test_a_probe_that_tests_nothing_does_not_pass(make_gpt, stream):
    probes = probe(Deaf(make_gpt()), window(stream), 32)
    assert probes.normalised
    assert not probes.causal
