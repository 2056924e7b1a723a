"""The model as a whole: causality, scoring, switches, documents."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgl.model import GPT, GPTConfig
from tests.parity.recipes import PRS, randomize, shallow

BASE = shallow("703", value_residual=True, gated_attention=True)
BOS = BASE.bos_id


def random_ids(length: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pr", PRS)
@given(position=st.integers(0, 11), new=st.integers(0, 63))
@settings(max_examples=8, deadline=None)
def test_features_depend_on_the_past_only(pr: str, position: int, new: int) -> None:
    gpt = randomize(GPT(shallow(pr)))
    ids = random_ids(12)
    changed = ids.clone()
    changed[:, position] = new
    with torch.no_grad():
        before, after = gpt.features(ids), gpt.features(changed)
    torch.testing.assert_close(before[:, :position], after[:, :position], atol=0, rtol=0)
    if (ids[:, position] != new).all():
        assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_losses_are_the_cross_entropy_of_the_logits(dtype: torch.dtype) -> None:
    gpt = randomize(GPT(BASE))
    ids, targets = random_ids(9).to(dtype), random_ids(9, seed=1).to(dtype)
    expected = -gpt(ids).log_softmax(-1).gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    losses = gpt.token_losses(ids, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)
    for last in (1, 4, 9):
        torch.testing.assert_close(gpt.token_losses(ids, targets, last=last), losses[:, -last:])
    for last in (0, 10):
        with pytest.raises(ValueError, match="last must be from 1 to the sequence length 9"):
            gpt.token_losses(ids, targets, last=last)


SWITCHES = {
    "mlp_activation": "relu2",
    "mlp_negative_slope": 0.1,
    "rope_base": 100.0,
    "rope_dims": None,
    "rope_train_len": 4,
    "qk_norm": False,
    "logit_softcap": 2.0,
    "ln_scale": False,
    "smear_document_reset": True,
    "xsa_last_layers": 1,
    "cache_layer": 2,
    "cache_attention": False,
    "document_mask": True,
    "bos_id": 5,
}
PARAMETER_SWITCHES = {
    "qk_gain_init": (None, {f"blocks.{i}.attn.q_gain" for i in range(4)}),
    "unet_skips": (False, {"skip_weights"}),
    "resid_mix": (False, {f"blocks.{i}.resid_mix" for i in range(4)}),
    "smear_gate": (False, {"smear.gate"}),
    "bigram_buckets": (0, {"bigram.scale", "bigram.embed.weight", "bigram.proj.weight"}),
    "value_residual": (False, {f"blocks.{i}.attn.value_mix" for i in range(1, 4)}),
    "gated_attention": (
        False,
        {f"blocks.{i}.attn.gate.{name}" for i in range(4) for name in ("weight", "bias")},
    ),
    "backout": (False, {"backout_lambda"}),
    "value_embedding_layers": (
        [],
        {"ve_shared.scale", "ve_shared.embed.weight", "ve_shared.proj.weight",
         "ve_layer_scales.0", "ve_layer_scales.1"},
    ),
}  # fmt: skip


def logits_with(config: GPTConfig, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    gpt = GPT(config)
    own = gpt.state_dict().keys()
    gpt.load_state_dict({name: weight for name, weight in weights.items() if name in own})
    with torch.no_grad():
        return gpt(ids)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_acts(switch: str) -> None:
    base = replace(BASE, document_mask=True) if switch == "bos_id" else BASE
    weights = randomize(GPT(base)).state_dict()
    ids = random_ids(12)
    ids[:, 6] = BOS
    changed = replace(base, **{switch: SWITCHES[switch]})
    assert getattr(changed, switch) != getattr(base, switch)
    difference = logits_with(base, weights, ids) - logits_with(changed, weights, ids)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("switch", PARAMETER_SWITCHES)
def test_switch_removes_its_parameters_and_acts(switch: str) -> None:
    value, names = PARAMETER_SWITCHES[switch]
    weights = randomize(GPT(BASE)).state_dict()
    changed = replace(BASE, **{switch: value})
    assert weights.keys() - GPT(changed).state_dict().keys() == names
    ids = random_ids(12)
    difference = logits_with(BASE, weights, ids) - logits_with(changed, weights, ids)
    assert difference.abs().max() > 1e-3


def test_untied_head_is_its_own_parameter() -> None:
    gpt = GPT(replace(BASE, tie_embeddings=False))
    ids = random_ids(5)
    assert torch.equal(gpt(ids), torch.zeros(2, 5, BASE.vocab_size))
    gpt.lm_head.weight.data.copy_(gpt.tok_emb.weight)
    assert torch.equal(gpt(ids), gpt.logits(gpt.features(ids)))
    assert not torch.equal(gpt(ids), torch.zeros(2, 5, BASE.vocab_size))


def test_odd_depth_leaves_the_last_layer_without_skip() -> None:
    for layers, skips in ((1, 0), (2, 1), (5, 2), (6, 3)):
        gpt = GPT(replace(BASE, num_layers=layers, value_embedding_layers=[], xsa_last_layers=1,
                          cache_layer=None, backout=False))  # fmt: skip
        assert (0 if gpt.skip_weights is None else len(gpt.skip_weights)) == skips
        assert gpt(random_ids(4)).isfinite().all()


@pytest.mark.parametrize("pr", PRS)
@pytest.mark.parametrize("lengths", [(5, 7), (1, 4, 7), (3, 1, 1, 7)])
def test_documents_in_a_row_equal_documents_one_by_one(pr: str, lengths: tuple[int, ...]) -> None:
    """Also with queries that start within a document: the first tokens have no BOS."""
    config = shallow(pr, document_mask=True, value_residual=True, gated_attention=True)
    gpt = randomize(GPT(config))
    for first_is_start in (True, False):
        documents = [random_ids(length, rows=1, seed=i) for i, length in enumerate(lengths)]
        for document in documents[0 if first_is_start else 1 :]:
            document[:, 0] = BOS
        with torch.no_grad():
            together = gpt(torch.cat(documents, dim=1))
            alone = torch.cat([gpt(document) for document in documents], dim=1)
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_documents_leak_without_the_mask() -> None:
    gpt = randomize(GPT(replace(BASE, document_mask=False)))
    ids = random_ids(12)
    ids[:, 6] = BOS
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 64
    assert not torch.equal(gpt(ids)[:, 6:], gpt(changed)[:, 6:])


def test_same_seed_same_weights() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(GPT(BASE).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
