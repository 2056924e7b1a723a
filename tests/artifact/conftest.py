import pytest
import torch

from pgl.artifact import save
from pgl.model import GPT, GPTConfig
from pgl.quant import QuantConfig, quantize_state


@pytest.fixture(scope="session")
def tiny_config():
    return GPTConfig(
        vocab_size=40,
        num_layers=2,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        mlp_hidden=24,
        bigram_buckets=24,
        bigram_dim=8,
        smear_gate=True,
        embedding_dtype="bfloat16",
    )


@pytest.fixture(scope="session")
def tiny_state(tiny_config):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator).mul(0.3).to(tensor.dtype)
        for name, tensor in GPT(tiny_config).state_dict().items()
    }


@pytest.fixture(scope="session")
def tiny_stored(tiny_state):
    return quantize_state(tiny_state, QuantConfig(passthrough_max_numel=150))


@pytest.fixture(scope="session")
def pack_tiny(tmp_path_factory, tiny_config, tiny_stored):
    """Give the bytes of the tiny model's artifact, packed with a codec."""

    def pack(codec):
        path = tmp_path_factory.mktemp("artifact") / "m"
        save(path, tiny_config, tiny_stored, codec=codec)
        return path.read_bytes()

    return pack


@pytest.fixture(scope="session")
def whole(pack_tiny):
    """An artifact with nothing wrong."""
    return pack_tiny("zstd")
