"""GPTConfig refuses what cannot work, and says which rule is broken."""

from dataclasses import asdict, fields, replace

import pytest

from pgl.model import GPT, GPTConfig
from pgl.model.config import MAX_PARAMETERS
from tests.parity.recipes import PRS, RECIPES, tiny

REFUSED = [
    ({"num_heads": 7}, "multiple of num_heads 7"),
    ({"num_kv_heads": 3}, "multiple of num_kv_heads 3"),
    ({"rope_dims": 15}, "rope_dims must be even"),
    ({"rope_dims": 128}, "at most the head size 64"),
    ({"rope_dims": 2}, "at least 4"),
    ({"num_layers": 0}, "num_layers must be above 0"),
    ({"vocab_size": -1}, "vocab_size must be above 0"),
    ({"embed_init_std": 0.0}, "embed_init_std must be above 0"),
    ({"logit_softcap": -1.0}, "logit_softcap"),
    ({"bigram_buckets": 1}, "bigram_buckets"),
    ({"bos_id": 1024}, "bos_id"),
    (
        {"value_embedding_layers": [9]},
        "different layers from 0 to 8",
    ),
    ({"value_embedding_layers": [2, 2]}, "value_embedding_layers"),
    ({"xsa_last_layers": 10}, "xsa_last_layers"),
    ({"cache_layer": 8}, "cache_layer must be from 0 to 7"),
    ({"cache_layer": -1}, "cache_layer"),
    ({"cache_layer": 3, "cache_attention": False}, "cache_attention or backout"),
    ({"backout": True}, "backout needs cache_layer"),
    ({"num_layers": 1, "resid_mix_init": "phase"}, "phase needs num_layers"),
    ({"document_mask": True, "attention_backend": "flash"}, "document_mask needs"),
    ({"kernels": "quack", "mlp_hidden": 1000}, "kernels quack needs model_dim .* not 512 and 1000"),
    ({"kernels": "quack", "model_dim": 480}, "kernels quack needs model_dim .* not 480 and"),
]


@pytest.mark.parametrize(("changes", "rule"), REFUSED, ids=lambda x: str(x))
def test_refuses(changes: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        GPTConfig(**changes)


def test_defaults_are_the_baseline() -> None:
    config = GPTConfig()
    assert (config.head_dim, config.kv_dim) == (64, 256)
    assert (config.rotated_dims, config.num_skips) == (64, 4)


EVERYTHING = {"tie_embeddings": False, "value_residual": True, "gated_attention": True}
NOTHING = {"qk_gain_init": None, "resid_mix": False, "unet_skips": False}


@pytest.mark.parametrize("changes", [{}, EVERYTHING, NOTHING], ids=["as it is", "more", "less"])
@pytest.mark.parametrize("pr", PRS)
def test_weights_are_counted_exactly(pr: str, changes: dict[str, object]) -> None:
    config = tiny(pr, **changes)
    assert config.num_weights == sum(t.numel() for t in GPT(config).state_dict().values())


def test_the_largest_model_is_the_largest_that_an_artifact_may_hold() -> None:
    assert GPTConfig(vocab_size=119_000).num_weights <= MAX_PARAMETERS
    with pytest.raises(ValueError, match=r"vocab_size must be lower: .* more than 134,217,728"):
        GPTConfig(vocab_size=230_000)
    with pytest.raises(ValueError, match="vocab_size must be lower"):
        GPTConfig(vocab_size=119_000, tie_embeddings=False)


@pytest.mark.parametrize("pr", PRS)
def test_recipe_round_trips_through_plain_values(pr: str) -> None:
    values = asdict(RECIPES[pr])
    assert {type(value) for value in values.values()} <= {int, float, bool, str, list, type(None)}
    assert GPTConfig(**values) == RECIPES[pr]


def test_value_embedding_layers_are_not_shared_between_configs() -> None:
    first, second = GPTConfig(), GPTConfig()
    first.value_embedding_layers.append(3)
    assert second.value_embedding_layers == []


def test_one_key_switches_each_technique_off() -> None:
    """Settings that only shape a technique may stay where they are when it is off."""
    off = {
        "smear_gate": False,
        "bigram_buckets": 0,
        "value_embedding_layers": [],
        "ln_scale": False,
        "xsa_last_layers": 0,
        "cache_attention": False,
        "backout": False,
        "unet_skips": False,
        "resid_mix": False,
        "qk_norm": False,
        "qk_gain_init": None,
        "logit_softcap": 0.0,
        "rope_dims": None,
        "init": "default",
        "mlp_activation": "relu2",
    }
    assert off.keys() <= {field.name for field in fields(GPTConfig)}
    for key, value in off.items():
        replace(RECIPES["703"], **{key: value})
