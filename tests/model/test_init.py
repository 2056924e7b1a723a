"""How weights start, on sizes where the statistics are cheap."""

import math

import pytest
import torch
from torch import Tensor

from pgl.model import GPT, GPTConfig
from pgl.model.init import depth_gain, phase
from tests.parity.recipes import shallow


def built(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(shallow("388", model_dim=64, **changes))


def is_orthogonal(weight: Tensor, gain: float) -> bool:
    gram = weight @ weight.T if weight.size(0) <= weight.size(1) else weight.T @ weight
    return torch.allclose(gram, gain**2 * torch.eye(len(gram)), atol=1e-5)


def test_orthogonal_init_with_zero_outputs() -> None:
    gpt = built()
    for block in gpt.blocks:
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.fc):
            assert is_orthogonal(linear.weight, 1.0)
        assert not block.attn.proj.weight.any()
        assert not block.mlp.proj.weight.any()


def test_scaled_output_projections() -> None:
    gpt = built(output_proj_init="scaled")
    for block in gpt.blocks:
        assert is_orthogonal(block.attn.proj.weight, 1 / math.sqrt(8))
        assert is_orthogonal(block.mlp.proj.weight, 1 / math.sqrt(8))


@pytest.mark.parametrize(("gain", "expected"), [("unit", 1.0), ("depth", 1 / math.sqrt(8))])
def test_side_projections(gain: str, expected: float) -> None:
    gpt = built(side_proj_gain=gain)
    assert depth_gain(4) == 1 / math.sqrt(8)
    assert is_orthogonal(gpt.bigram.proj.weight, expected)
    assert is_orthogonal(gpt.ve_shared.proj.weight, expected)


def test_default_init_is_that_of_torch() -> None:
    gpt = built(init="default")
    for linear in (gpt.blocks[0].attn.c_q, gpt.blocks[3].mlp.fc, gpt.bigram.proj):
        bound = 1 / math.sqrt(linear.in_features)
        assert not is_orthogonal(linear.weight, 1.0)
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not gpt.blocks[0].attn.proj.weight.any()


def test_bigram_starts_at_zero_but_learns() -> None:
    gpt = built()
    assert not gpt.bigram.embed.weight.any()
    ids = torch.randint(64, (2, 8))
    gpt.token_losses(ids, ids.roll(-1, 1)).mean().backward()
    assert gpt.bigram.embed.weight.grad.any()


def test_phase_transition() -> None:
    gpt = built(resid_mix_init="phase")
    shares = [block.resid_mix[0, 0].item() for block in gpt.blocks]
    assert shares == pytest.approx([1 / (1 + math.exp(-3 * (i / 3 - 0.5))) for i in range(4)])
    for block, share in zip(gpt.blocks, shares, strict=True):
        assert (block.resid_mix[0] == share).all()
        torch.testing.assert_close(block.resid_mix.sum(0), torch.ones(64))
    assert phase(0, 10) == pytest.approx(0.1824, abs=1e-4)
    assert phase(9, 10) == pytest.approx(0.8176, abs=1e-4)


def test_constants_and_embedding() -> None:
    gpt = GPT(GPTConfig(num_layers=2, qk_gain_init=1.25, cache_layer=0, backout=True,
                        backout_lambda_init=0.2, embed_init_std=0.02))  # fmt: skip
    assert gpt.tok_emb.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (gpt.blocks[0].attn.q_gain == 1.25).all()
    assert gpt.backout_lambda.item() == pytest.approx(0.2)
    assert (gpt.skip_weights == 1).all()
    assert torch.equal(gpt.blocks[1].resid_mix[0], torch.ones(512))
    assert not gpt.blocks[1].resid_mix[1].any()
