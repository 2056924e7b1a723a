"""The four recipes' architectures, and how the golden vectors name and size them."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pgl.model import GPT, GPTConfig

PRS = ("236", "324", "388", "703")

_COMMON = GPTConfig(
    num_layers=11,
    mlp_hidden=1536,
    init="orthogonal",
    side_proj_gain="depth",
    smear_gate=True,
    bigram_buckets=2048,
    embedding_dtype="bfloat16",
)
_388 = replace(_COMMON, rope_dims=16, ln_scale=True, value_embedding_layers=[9, 10])

RECIPES: dict[str, GPTConfig] = {
    "236": _COMMON,
    "324": replace(
        _COMMON, num_layers=10, bigram_buckets=10240, rope_train_len=2048, resid_mix_init="phase"
    ),
    "388": _388,
    "703": replace(
        _388,
        side_proj_gain="unit",
        mlp_activation="leaky_relu2",
        xsa_last_layers=4,
        cache_layer=7,
        backout=True,
    ),
}


def tiny(pr: str, **changes: object) -> GPTConfig:
    """A recipe with all its layers and techniques, but narrow: fast on a CPU."""
    config = replace(
        RECIPES[pr],
        vocab_size=64,
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_hidden=64,
        bigram_buckets=97,
        bigram_dim=16,
        value_embedding_dim=8,
        rope_dims=4 if RECIPES[pr].rope_dims else None,
        embedding_dtype="float32",
    )
    return replace(config, **changes)


def shallow(pr: str, **changes: object) -> GPTConfig:
    """A narrow recipe cut to 4 layers, each technique still acting on one of them or more."""
    depth: dict[str, object] = {"num_layers": 4}
    if RECIPES[pr].value_embedding_layers:
        depth["value_embedding_layers"] = [2, 3]
    if RECIPES[pr].xsa_last_layers:
        depth |= {"xsa_last_layers": 2, "cache_layer": 1}
    return tiny(pr, **(depth | changes))


def randomize(gpt: GPT, seed: int = 0) -> GPT:
    """Random weights everywhere, those that start at zero or one included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in gpt.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter.size(1) ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.data.copy_(noise * scale + (0.0 if parameter.ndim == 2 else 1.0))
    return gpt


def golden_config(pr: str, arrays: Mapping[str, np.ndarray], **changes: object) -> GPTConfig:
    """The recipe in the sizes of a ``model_*`` file."""
    vocab, layers, dim, heads, kv_heads, hidden, bigram_rows, bigram_dim = (
        int(size) for size in arrays["config"]
    )
    if "param/ve_shared.embed.weight" in arrays:
        changes["value_embedding_dim"] = arrays["param/ve_shared.embed.weight"].shape[1]
    return tiny(
        pr,
        vocab_size=vocab,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_hidden=hidden,
        bigram_buckets=bigram_rows,
        bigram_dim=bigram_dim,
        **changes,
    )


def golden_tensors(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """All ``prefix/NAME`` arrays by name, the banks of PR #703 taken apart into layers."""
    start = f"{prefix}/"
    tensors = {
        name.removeprefix(start): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(start)
    }
    return unbank(tensors)


def unbank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split PR #703's parameter banks into per-layer weights under this package's names."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_bank")}
    if "qo_bank" not in tensors:
        return plain
    layers = tensors["mlp_up_bank"].size(0)
    for i in range(layers):
        block = f"blocks.{i}"
        plain[f"{block}.attn.c_q.weight"] = tensors["qo_bank"][i]
        plain[f"{block}.attn.proj.weight"] = tensors["qo_bank"][layers + i]
        plain[f"{block}.attn.c_k.weight"] = tensors["kv_bank"][i]
        plain[f"{block}.attn.c_v.weight"] = tensors["kv_bank"][layers + i]
        plain[f"{block}.mlp.fc.weight"] = tensors["mlp_up_bank"][i]
        plain[f"{block}.mlp.proj.weight"] = tensors["mlp_down_bank"][i]
    return plain


def golden_model(pr: str, arrays: Mapping[str, np.ndarray], **changes: object) -> GPT:
    """The model of a ``model_*`` file with its weights."""
    gpt = GPT(golden_config(pr, arrays, **changes))
    gpt.load_state_dict(golden_tensors(arrays, "param"), strict=True)
    return gpt
