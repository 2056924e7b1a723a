"""Which technique of a run acted, and when: the reference runs had many that never did."""

from typing import Any

import lightning.pytorch as pl

from callbacks.find import find_callback, optional_callback
from callbacks.gptq_export import GPTQExport
from callbacks.quantization_aware_training import QuantizationAwareTraining
from callbacks.sliding_window_bpb import SlidingWindowBPB
from callbacks.test_time_training import TestTimeTraining
from callbacks.training_metrics import TrainingMetrics
from callbacks.wall_clock_budget import WallClockBudget
from callbacks.weight_averaging import WeightAveraging
from pgl.optim import ScheduleConfig
from pgl.quant import storage_kind, tensor_group


def techniques(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[dict[str, str]]:
    """Return one row per technique that is switched on: name, setting, and what it did.

    What is part of the model acts in every step; what depends on the schedule is looked up.
    """
    rows = [_row(name, setting, "every step") for name, setting in _architecture(pl_module)]
    rows += _rope_rescaling(trainer, pl_module)
    rows += [_row(name, setting, "at the start") for name, setting in _initial(pl_module)]
    return [
        *rows,
        *_training(trainer, pl_module),
        *_export(trainer),
        *_scoring(trainer),
        *_ttt(trainer),
    ]


def _training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[dict[str, str]]:
    optimizer, schedule = pl_module.optimizer_config, pl_module.schedule
    decays = {
        "Muon weight decay": optimizer.muon_weight_decay,
        "AdamW weight decay": optimizer.adam_weight_decay,
    }
    rows = [_row(name, decay, "every step") for name, decay in decays.items() if decay > 0]
    if optimizer.momentum_format != "float32":
        saved = trainer.optimizers[0].momentum_bytes_saved() / 1e6
        acted = f"every step, saves {saved:.2f} MB"
        rows.append(_row("Muon momentum format", optimizer.momentum_format, acted))
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
            f"{schedule.warmdown_shape}, {_length(schedule, 'warmdown')}",
            _since(budget.warmdown_start_step),
        )
    )
    rows += _scaled_run(budget.step_scale, pl_module)
    qat = optional_callback(trainer, QuantizationAwareTraining)
    if qat is not None and qat.start != "never":
        report = qat.report()
        setting = f"{report['start']}: {report['layers']}"
        rows.append(_row("fake quantisation", setting, _since(report["first_step"])))
    if pl_module.loss_config.mile_gamma > 0:
        acted = "from step 0"
        if budget.mile_end_step is not None:
            acted += f" until step {budget.mile_end_step:,}"
        rows.append(_row("MiLe loss", pl_module.loss_config.mile_gamma, acted))
    averaging = find_callback(trainer, WeightAveraging)
    for name, state in averaging.report().items():
        if isinstance(state, dict):
            acted = f"{state['updates']:,} updates, {_since(state['first_update_step'])}"
            if state["updates"] and not averaging.is_usable(name):
                acted += ", too few: never"
            rows.append(_row(f"weight averaging: {name}", state["setting"], acted))
    return rows


def _scaled_run(step_scale: float, pl_module: pl.LightningModule) -> list[dict[str, str]]:
    """Return what a shorter run made of the schedule's steps; averages have rows of their own."""
    if step_scale == 1:
        return []
    names = {"warmdown": "warm-down", "momentum_warmup": "momentum warm-up"}
    recipe, run = pl_module.schedule_config, pl_module.schedule
    acted = [
        f"{label} {_length(recipe, name)} -> {_length(run, name)}"
        for name, label in names.items()
        if getattr(recipe, f"{name}_steps") is not None
    ]
    return [_row("shortened recipe", f"{step_scale:g} x its steps", "; ".join(acted) or "never")]


def _length(schedule: ScheduleConfig, name: str) -> str:
    steps = getattr(schedule, f"{name}_steps")
    if steps is None:
        return f"{getattr(schedule, f'{name}_fraction'):g} of the run"
    return f"{steps:,} steps"


def _rope_rescaling(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[dict[str, str]]:
    data, validation = trainer.datamodule, find_callback(trainer, SlidingWindowBPB)
    reference = pl_module.gpt_config.rope_train_len
    window = validation.seq_len or data.seq_len
    if max(data.seq_len, window) <= reference:
        return []
    in_training = data.seq_len > reference
    setting = f"{data.seq_len if in_training else window} tokens, reference {reference}"
    acted = "every step" if in_training else "when scoring with sliding windows"
    return [_row("NTK-aware RoPE rescaling", setting, acted)]


def _export(trainer: pl.Trainer) -> list[dict[str, str]]:
    """Return what was done to the weights on their way into the artifact."""
    exporter = find_callback(trainer, GPTQExport)
    quant, exported = exporter.quant, exporter.exported
    weights = exported.state_dict if exported is not None else {}
    matrices = {name: weight for name, weight in weights.items() if weight.ndim == 2}
    rows = []
    groups = [name for name in ("attention", "mlp") if getattr(quant, name).method == "gptq"]
    if groups:
        coded = [
            name
            for name, weight in matrices.items()
            if tensor_group(name, weight.ndim) in groups
            and storage_kind(name, weight.shape, quant).startswith("int")
        ]
        setting = (
            f"{', '.join(groups)}; steps {quant.gptq.steps}; search {exporter.search}; "
            f"{exporter.calibration_sequences:,} calibration sequences"
        )
        rows.append(_row("GPTQ", setting, _matrices(len(coded))))
    if quant.prune_fraction > 0:
        pruned = [w for w in matrices.values() if w.numel() >= quant.prune_min_numel]
        rows.append(_row("pruning", quant.prune_fraction, _matrices(len(pruned))))
    return rows


def _scoring(trainer: pl.Trainer) -> list[dict[str, str]]:
    validation = find_callback(trainer, SlidingWindowBPB)
    window = validation.seq_len or trainer.datamodule.seq_len
    if validation.stride_tokens >= window:
        return []
    scored = [score.weights for score in validation.scores if score.windows == "sliding"]
    setting = f"stride of {validation.stride_tokens} in windows of {window} tokens"
    acted = f"scored {', '.join(scored)} weights" if scored else "never"
    return [_row("sliding-window scoring", setting, acted)]


def _ttt(trainer: pl.Trainer) -> list[dict[str, str]]:
    ttt = optional_callback(trainer, TestTimeTraining)
    if ttt is None or ttt.method == "off":
        return []
    report = ttt.report()
    acted = f"on {report['trained_targets']:,} validation targets" if report else "never"
    setting = "before scoring: not legal" if ttt.method == "full" else "score-first"
    return [_row("test-time training", setting, acted)]


def _matrices(count: int) -> str:
    return f"on {count:,} matrices at export" if count else "never"


def _initial(pl_module: pl.LightningModule) -> list[tuple[str, Any]]:
    gpt = pl_module.gpt_config
    switches = {
        "orthogonal init": gpt.init == "orthogonal",
        "scaled init of output projections": gpt.output_proj_init == "scaled",
    }
    return [(name, value) for name, value in switches.items() if value]


def _architecture(pl_module: pl.LightningModule) -> list[tuple[str, Any]]:
    gpt = pl_module.gpt_config
    switches = {
        "grouped-query attention": gpt.num_kv_heads < gpt.num_heads
        and f"{gpt.num_kv_heads} of {gpt.num_heads} heads",
        "QK norm": gpt.qk_norm,
        "q gain": gpt.qk_gain_init is not None and f"from {gpt.qk_gain_init}",
        "leaky ReLU squared": gpt.mlp_activation == "leaky_relu2"
        and f"slope {gpt.mlp_negative_slope}",
        "U-Net skips": gpt.unet_skips,
        "residual mix with x0": gpt.resid_mix and gpt.resid_mix_init,
        "SmearGate": gpt.smear_gate,
        "SmearGate document reset": gpt.smear_gate
        and (gpt.smear_document_reset or gpt.document_mask),
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
        "tied embeddings": gpt.tie_embeddings,
    }
    return [(name, value) for name, value in switches.items() if value]


def _row(technique: str, setting: Any, acted: str) -> dict[str, str]:
    return {"technique": technique, "setting": str(setting), "acted": acted}


def _since(step: int | None) -> str:
    return "never" if step is None else f"from step {step:,}"
