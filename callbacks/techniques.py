"""Which technique of a run acted, and when: the reference runs had many that never did."""

from typing import Any

import lightning.pytorch as pl

from callbacks.find import find_callback
from callbacks.training_metrics import TrainingMetrics
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging


def techniques(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[dict[str, str]]:
    """Return one row per technique that is switched on: name, setting, and what it did.

    What is part of the model acts in every step; what depends on the schedule is looked up.
    """
    rows = [_row(name, setting, "every step") for name, setting in _architecture(pl_module)]
    optimizer, schedule = pl_module.optimizer_config, pl_module.schedule_config
    decays = {
        "Muon weight decay": optimizer.muon_weight_decay,
        "AdamW weight decay": optimizer.adam_weight_decay,
    }
    rows += [_row(name, decay, "every step") for name, decay in decays.items() if decay > 0]
    if optimizer.grad_clip_norm is not None:
        clipped = find_callback(trainer, TrainingMetrics).clipped_steps
        rows.append(
            _row(
                "gradient clipping",
                optimizer.grad_clip_norm,
                f"in {clipped:,} of {trainer.global_step:,} steps",
            )
        )
    budget = find_callback(trainer, WallClockBudget)
    rows.append(
        _row(
            "learning-rate warmdown",
            schedule.warmdown_shape,
            _since(budget.warmdown_start_step),
        )
    )
    if pl_module.loss_config.mile_gamma > 0:
        acted = "from step 0"
        if budget.mile_end_step is not None:
            acted += f" until step {budget.mile_end_step:,}"
        rows.append(_row("MiLe loss", pl_module.loss_config.mile_gamma, acted))
    for name, state in find_callback(trainer, WeightAveraging).report().items():
        if isinstance(state, dict):
            acted = f"{state['updates']:,} updates, {_since(state['first_update_step'])}"
            rows.append(_row(f"weight averaging: {name}", "on", acted))
    return rows


def _architecture(pl_module: pl.LightningModule) -> list[tuple[str, Any]]:
    gpt = pl_module.gpt_config
    switches = {
        "U-Net skips": gpt.unet_skips,
        "residual mix with x0": gpt.resid_mix and gpt.resid_mix_init,
        "SmearGate": gpt.smear_gate,
        "BigramHash": gpt.bigram_buckets,
        "value embeddings": gpt.value_embedding_layers,
        "LN scale": gpt.ln_scale,
        "XSA": gpt.xsa_last_layers,
        "cached attention": gpt.cache_layer is not None and gpt.cache_attention,
        "backout": gpt.backout,
        "value residual": gpt.value_residual,
        "gated attention": gpt.gated_attention,
        "document mask": gpt.document_mask,
        "partial RoPE": gpt.rope_dims,
        "logit softcap": gpt.logit_softcap,
        "orthogonal init": gpt.init == "orthogonal",
        "tied embeddings": gpt.tie_embeddings,
    }
    return [(name, value) for name, value in switches.items() if value]


def _row(technique: str, setting: Any, acted: str) -> dict[str, str]:
    return {"technique": technique, "setting": str(setting), "acted": acted}


def _since(step: int | None) -> str:
    return "never" if step is None else f"from step {step:,}"
