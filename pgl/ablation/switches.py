"""Every technique that the command line can switch off, by name: the one list of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]
"""Dotted configuration keys with their values."""

AVERAGES = ("ema", "swa", "last")


@dataclass(frozen=True)
class Switch:
    """How one technique is switched off."""

    name: str
    """What ``pgl ablate --off`` calls it."""
    technique: str | None
    """What a run's report calls it; None if the report has no row for it."""
    off: Settings | Callable[[Settings], Settings]
    """The settings without the technique, where they depend on the recipe as a function of it."""
    on: Callable[[Settings], bool] | None = None
    """Whether a recipe has the technique. None: whether ``off`` would change it."""

    def settings(self, recipe: Settings) -> Settings:
        """Return the keys that switch the technique off in a recipe, with their values.

        Args:
            recipe: Its resolved configuration with dotted keys.

        Raises:
            ValueError: If the recipe does not have the technique on.
        """
        if not self.is_on(recipe):
            raise ValueError(
                f"--off {self.name}: the recipe does not have it on ({self._now(recipe)}); "
                "leave it out"
            )
        return self._off(recipe)

    def is_on(self, recipe: Settings) -> bool:
        """Whether a recipe has the technique on."""
        if self.on is not None:
            return self.on(recipe)
        return any(_value(recipe, key) != value for key, value in self._off(recipe).items())

    def _off(self, recipe: Settings) -> Settings:
        return self.off(recipe) if callable(self.off) else self.off

    def _now(self, recipe: Settings) -> str:
        return ", ".join(f"{key} is {_value(recipe, key)}" for key in self._off(recipe))


def _value(recipe: Settings, key: str) -> Any:
    """Return a setting; a section that is there (``averaging.ema.decay``) counts as its value."""
    if key in recipe:
        return recipe[key]
    section = {name: v for name, v in recipe.items() if name.startswith(f"{key}.")}
    return section or None


def _gpt(**settings: Any) -> Settings:
    return {f"model.gpt.{name}": value for name, value in settings.items()}


def _optimizer(**settings: Any) -> Settings:
    return {f"model.optimizer.{name}": value for name, value in settings.items()}


def _schedule(**settings: Any) -> Settings:
    return {f"model.schedule.{name}": value for name, value in settings.items()}


def _without_cached_attention(recipe: Settings) -> Settings:
    # Backout goes on with the same kept stream.
    if recipe["model.gpt.backout"]:
        return _gpt(cache_attention=False)
    return _gpt(cache_layer=None)


def _without_backout(recipe: Settings) -> Settings:
    if recipe["model.gpt.cache_attention"]:
        return _gpt(backout=False)
    return _gpt(backout=False, cache_layer=None)


def _without_average(name: str) -> Callable[[Settings], Settings]:
    """Export another average in its place, or the raw weights if there is none."""

    def off(recipe: Settings) -> Settings:
        settings: Settings = {f"averaging.{name}": None}
        if recipe["averaging.source"] == name:
            others = [n for n in AVERAGES if n != name and _has_average(n)(recipe)]
            settings["averaging.source"] = others[0] if others else "raw"
        scored = recipe["averaging.score"]
        if isinstance(scored, list) and name in scored:
            settings["averaging.score"] = [n for n in scored if n != name]
        return settings

    return off


def _has_average(name: str) -> Callable[[Settings], bool]:
    return lambda recipe: _value(recipe, f"averaging.{name}") is not None


def _without_groups(key: str, value: Any) -> Callable[[Settings], Settings]:
    """Set ``key`` for each tensor group that differs, as the groups have rules of their own."""

    def off(recipe: Settings) -> Settings:
        groups = ("attention", "mlp", "token_embedding", "bigram", "value_embedding")
        keys = [f"artifact.quant.{group}.{key}" for group in groups]
        changed = {k: value for k in keys if recipe.get(k) != value}
        return changed or {keys[0]: value}

    return off


def _window(recipe: Settings) -> int:
    return recipe["validation.seq_len"] or recipe["data.seq_len"]


def _has_raised_lr(recipe: Settings) -> bool:
    return recipe["model.optimizer.matrix_lr"] == 0.026


# In the order of docs/techniques.md.
_ALL = (
    # Architecture
    Switch("leaky_relu2", "leaky ReLU squared", _gpt(mlp_activation="relu2")),
    Switch(
        "gqa",
        "grouped-query attention",
        lambda recipe: _gpt(num_kv_heads=recipe["model.gpt.num_heads"]),
    ),
    Switch("qk_norm", "QK norm", _gpt(qk_norm=False)),
    Switch("q_gain", "q gain", _gpt(qk_gain_init=None)),
    Switch("partial_rope", "partial RoPE", _gpt(rope_dims=None)),
    Switch(
        "ntk_rope",
        "NTK-aware RoPE rescaling",
        lambda recipe: _gpt(rope_train_len=max(recipe["data.seq_len"], _window(recipe))),
        on=lambda recipe: (
            max(recipe["data.seq_len"], _window(recipe)) > recipe["model.gpt.rope_train_len"]
        ),
    ),
    Switch("smear_gate", "SmearGate", _gpt(smear_gate=False)),
    Switch("smear_document_reset", "SmearGate document reset", _gpt(smear_document_reset=False)),
    Switch("bigram", "BigramHash", _gpt(bigram_buckets=0)),
    Switch("unet_skips", "U-Net skips", _gpt(unet_skips=False)),
    Switch("resid_mix", "residual mix with x0", _gpt(resid_mix=False)),
    Switch("resid_mix_phase", None, _gpt(resid_mix_init="identity")),
    Switch("value_embedding", "value embeddings", _gpt(value_embedding_layers=[])),
    Switch("ln_scale", "LN scale", _gpt(ln_scale=False)),
    Switch("xsa", "XSA", _gpt(xsa_last_layers=0)),
    Switch(
        "cache",
        "cached attention",
        _without_cached_attention,
        on=lambda recipe: (
            recipe["model.gpt.cache_layer"] is not None and recipe["model.gpt.cache_attention"]
        ),
    ),
    Switch("backout", "backout", _without_backout, on=lambda recipe: recipe["model.gpt.backout"]),
    Switch("value_residual", "value residual", _gpt(value_residual=False)),
    Switch("gated_attention", "gated attention", _gpt(gated_attention=False)),
    Switch("document_mask", "document mask", _gpt(document_mask=False)),
    Switch("tied_embeddings", "tied embeddings", _gpt(tie_embeddings=False)),
    Switch("softcap", "logit softcap", _gpt(logit_softcap=0.0)),
    Switch("bf16_embeddings", None, _gpt(embedding_dtype="float32")),
    # Initialisation
    Switch("orthogonal_init", "orthogonal init", _gpt(init="default")),
    Switch(
        "scaled_output_init",
        "scaled init of output projections",
        _gpt(output_proj_init="zero"),
    ),
    # Optimizer
    Switch("nesterov", None, _optimizer(nesterov=False)),
    Switch("polar_express", None, _optimizer(ns_coefficients="keller")),
    Switch("muon_weight_decay", "Muon weight decay", _optimizer(muon_weight_decay=0.0)),
    Switch("adam_weight_decay", "AdamW weight decay", _optimizer(adam_weight_decay=0.0)),
    Switch("grad_clip", "gradient clipping", _optimizer(grad_clip_norm=None, clip="reduced")),
    Switch("local_clip", None, _optimizer(clip="reduced")),
    Switch("momentum_format", "Muon momentum format", _optimizer(momentum_format="float32")),
    Switch(
        "raised_lr",
        None,
        _optimizer(matrix_lr=0.025, scalar_lr=0.025, embedding_lr=0.035),
        on=_has_raised_lr,
    ),
    # Schedule and loss
    Switch(
        "warmdown",
        "learning-rate warmdown",
        _schedule(warmdown_steps=0, warmdown_fraction=None),
    ),
    Switch("cosine_warmdown", None, _schedule(warmdown_shape="linear")),
    Switch("warmdown_cap", None, _schedule(warmdown_max_fraction=None)),
    Switch(
        "momentum_warmup",
        None,
        _schedule(momentum_warmup_steps=0, momentum_warmup_fraction=None),
    ),
    Switch("mile", "MiLe loss", {"model.loss.mile_gamma": 0.0}),
    Switch("qat", "fake quantisation", {"qat.start": "never"}),
    # Averaging
    *(
        Switch(name, f"weight averaging: {name}", _without_average(name), on=_has_average(name))
        for name in AVERAGES
    ),
    # Quantisation and size
    Switch(
        "gptq",
        "GPTQ",
        {f"artifact.quant.{group}.method": "round" for group in ("attention", "mlp")}
        | {"artifact.quant.gptq.steps": "grid"},
        on=lambda recipe: (
            "gptq" in [recipe[f"artifact.quant.{group}.method"] for group in ("attention", "mlp")]
        ),
    ),
    Switch("balanced_steps", None, {"artifact.quant.gptq.steps": "grid"}),
    Switch("scale_floor", None, _without_groups("grid.scale_floor", None)),
    Switch(
        "clip_search",
        None,
        {f"artifact.quant.{group}.grid.clip": "max" for group in ("attention", "mlp")},
        on=lambda recipe: (
            "search"
            in [recipe[f"artifact.quant.{group}.grid.clip"] for group in ("attention", "mlp")]
        ),
    ),
    Switch("size_search", None, {"artifact.search": "off"}),
    Switch("pruning", "pruning", {"artifact.quant.prune_fraction": 0.0}),
    # Evaluation
    Switch(
        "sliding_window",
        "sliding-window scoring",
        lambda recipe: {"validation.stride_tokens": _window(recipe)},
    ),
    Switch("long_context_scoring", None, {"validation.seq_len": None}),
    Switch("ttt", None, {"ttt.method": "off"}),
    # Several processes
    Switch(
        "parallel_muon",
        None,
        {"trainer.strategy": "auto"},
        on=lambda recipe: recipe["trainer.strategy"] == "parallel_muon",
    ),
)

SWITCHES: dict[str, Switch] = {switch.name: switch for switch in _ALL}


def switch(name: str) -> Switch:
    """Return a switch by its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in SWITCHES:
        raise ValueError(f"--off {name}: unknown; choose from {', '.join(SWITCHES)}")
    return SWITCHES[name]
