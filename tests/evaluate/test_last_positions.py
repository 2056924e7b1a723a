"""The last block computed for the scored positions only: the scores of the whole computation."""

import pytest
import torch

from pgl.model import GPT, GPTConfig
from pgl.model.attention import attend, lower_right_mask

EVERYTHING = {
    "smear_gate": True,
    "bigram_buckets": 29,
    "bigram_dim": 8,
    "value_embedding_layers": [2, 3],
    "value_embedding_dim": 8,
    "xsa_last_layers": 2,
    "cache_layer": 1,
    "backout": True,
    "value_residual": True,
    "gated_attention": True,
    "ln_scale": True,
    "rope_dims": 4,
}


def make(device: str = "cpu", **changes) -> GPT:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "num_layers": 4,
        "model_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_hidden": 128,
    }
    gpt = GPT(GPTConfig(**settings | changes))
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return gpt.to(device)


def tokens(device: str = "cpu", length: int = 49) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 64, (3, length), generator=generator).to(device)


@pytest.mark.parametrize("last", [1, 7, 47, 48])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        EVERYTHING,
        {"document_mask": True},
        {"num_layers": 1},
        {"unet_skips": False, "cache_layer": 2, "backout": True},
        {"num_kv_heads": 4, "attention_backend": "math"},
    ],
    ids=["plain", "everything", "document mask", "one layer", "backout", "math"],
)
def test_scores_are_those_of_the_whole_computation(changes, last):
    gpt, ids = make(**changes), tokens()

    whole = gpt.token_losses(ids[:, :-1], ids[:, 1:])
    scored = gpt.token_losses(ids[:, :-1], ids[:, 1:], last=last)

    assert scored.shape == (3, last)
    torch.testing.assert_close(scored, whole[:, -last:], rtol=0, atol=1e-6)


def test_gradients_are_those_of_the_whole_computation():
    gpt, ids = make(**EVERYTHING), tokens()
    grads = []
    for last in (None, 5):
        losses = gpt.token_losses(ids[:, :-1], ids[:, 1:], last)
        grads.append(torch.autograd.grad(losses[:, -5:].sum(), list(gpt.parameters())))

    for whole, short in zip(*grads, strict=True):
        torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-5)


def test_the_last_block_works_on_the_scored_positions_only():
    gpt, ids, lengths = make(), tokens(), {}
    for name, module in gpt.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith((".fc", ".proj", ".c_q", ".c_k")):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: lengths.update({name: inputs[0].shape[1]})
            )

    gpt.token_losses(ids[:, :-1], ids[:, 1:], last=5)

    short = {name for name, length in lengths.items() if length == 5}
    assert short >= {"blocks.3.attn.c_q", "blocks.3.attn.proj", "blocks.3.mlp.fc"}
    assert not any(name.startswith(("blocks.0", "blocks.1", "blocks.2")) for name in short)
    assert lengths["blocks.3.attn.c_k"] == 48


@pytest.mark.parametrize("keys", [5, 6, 9])
def test_fewer_queries_than_keys_are_the_last_ones(keys):
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    whole = attend(q[:, :keys], k[:, :keys], v[:, :keys])

    for backend in ("auto", "flash", "math"):
        short = attend(q[:, keys - 5 : keys], k[:, :keys], v[:, :keys], backend=backend)
        torch.testing.assert_close(short, whole[:, -5:])

    mask = lower_right_mask(5, keys, torch.device("cpu"))[0, 0]
    for query in range(5):
        assert mask[query].tolist() == [key <= keys - 5 + query for key in range(keys)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("backend", "head_dim"),
    # Heads of 36 are not the flash kernel's: the mask stands in for it.
    [("auto", 64), ("flash", 64), ("cudnn", 64), ("math", 64), ("auto", 36)],
)
@pytest.mark.parametrize("last", [64, 200])
@torch.no_grad()
def test_bfloat16_scores_on_a_gpu(backend, last, head_dim):
    gpt = make("cuda", **EVERYTHING, model_dim=4 * head_dim, attention_backend=backend)
    ids = tokens("cuda", 513)
    exact = gpt.double().token_losses(ids[:, :-1], ids[:, 1:]) if backend == "math" else None
    gpt.float()
    with torch.autocast("cuda", torch.bfloat16):
        whole = gpt.token_losses(ids[:, :-1], ids[:, 1:])[:, -last:]
        scored = gpt.token_losses(ids[:, :-1], ids[:, 1:], last=last)
    # Other tiles, other roundings of bfloat16: as far from it as from the exact score.
    torch.testing.assert_close(scored, whole, rtol=0, atol=0.1)
    assert float((scored - whole).mean().abs()) < 2e-3
    if exact is not None:
        torch.testing.assert_close(scored, exact[:, -last:].float(), rtol=0, atol=0.1)
