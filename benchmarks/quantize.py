"""Time of calibration, quantisation and packing: python benchmarks/quantize.py --config FILE.

The recipe's plan of quantisation, and its large matrices rounded, with GPTQ and with balanced
steps. The recipe's model at its initialisation, or the weights of --ckpt_path (an artifact or a
checkpoint), made-up tokens, one device, no Trainer. Seconds and sizes as JSON on the last line;
sizes mean something with --ckpt_path alone.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timing import load_recipe, make, wait

from pgl.artifact import CODECS, fit_to_limit, pack_model
from pgl.artifact.checkpoint_io import GolfCheckpointIO
from pgl.artifact.codecs import compress, decompress
from pgl.artifact.entropy import predicted_bytes
from pgl.artifact.size import order0_bytes
from pgl.artifact.streams import code_layout, make_table, plan_streams, to_streams
from pgl.challenge import ARTIFACT_LIMIT_BYTES
from pgl.generate import generate_batch
from pgl.quant import (
    Calibration,
    QuantConfig,
    StateQuantizer,
    StoredTensor,
    collect_hessians,
    collect_output_energies,
)


class Stopwatch:
    """Seconds of named pieces of work, printed as they end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work and return its result."""
        wait(self.device)
        start = time.perf_counter()
        result = work()
        wait(self.device)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        print(f"{name:<24}{self.seconds[name]:>9.3f} s", flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--sample-sequences", type=int, default=0)
    parser.add_argument("--limit-bytes", type=int, default=ARTIFACT_LIMIT_BYTES)
    parser.add_argument("--codecs", nargs="*", default=sorted(CODECS))
    options = parser.parse_args()
    recipe, module = load_recipe(options.config)
    if options.ckpt_path is not None:
        checkpoint = GolfCheckpointIO().load_checkpoint(options.ckpt_path, map_location="cpu")
        module.load_state_dict(checkpoint["state_dict"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpt = module.gpt.to(device).eval()
    seq_len = recipe["data"]["seq_len"]
    ids = torch.randint(module.gpt_config.vocab_size, (options.sequences, seq_len + 1))
    watch = Stopwatch(device)

    plans = _variants(make(QuantConfig, (recipe.get("artifact") or {}).get("quant") or {}))
    with torch.autocast(device.type, torch.bfloat16):
        calibration = _calibrate(watch, gpt, ids, device)
        if options.sample_sequences:
            uniform = torch.rand(options.sample_sequences, seq_len)
            watch.time("sample", lambda: generate_batch(gpt, uniform))
    state = dict(gpt.named_parameters())
    stored: dict[str, StoredTensor] = {}
    for name, plan in plans.items():
        quantizer = watch.time(
            f"prepare {name}",
            lambda plan=plan: StateQuantizer(state, plan, calibration, device),
        )
        stored = watch.time(f"quantise {name}", quantizer)
    sizes = {codec: _codec(watch, codec, stored) for codec in options.codecs}
    packs = []

    def pack(found: dict[str, StoredTensor]) -> int:
        packs.append(pack_model(module.gpt_config, found, codec="rans"))
        return packs[-1].size.total_bytes

    fit = watch.time(
        "fit to limit", lambda: fit_to_limit(quantizer, pack, options.limit_bytes, refine=True)
    )
    result = {
        "config": options.config,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "calibration_tokens": options.sequences * seq_len,
        "seconds": watch.seconds,
        "code_bytes": sizes,
        "code_entropy_bytes": _entropies(stored),
        "step_factor": round(fit.step_factor, 4),
        "packs": [attempt.total_bytes for attempt in fit.attempts],
    }
    print(json.dumps(result))


def _variants(plan: QuantConfig) -> dict[str, QuantConfig]:
    """The recipe's plan, last, and what differs from it in the method of the large matrices."""

    def with_method(method: str, **gptq: str) -> QuantConfig:
        return replace(
            plan,
            attention=replace(plan.attention, method=method),
            mlp=replace(plan.mlp, method=method),
            gptq=replace(plan.gptq, **gptq),
        )

    variants = {
        "round": with_method("round"),
        "gptq": with_method("gptq", steps="grid"),
        "balanced": with_method("gptq", steps="balanced", select_by="mse"),
    }
    distinct = {name: variant for name, variant in variants.items() if variant != plan}
    return {**distinct, "recipe": plan}


def _calibrate(
    watch: Stopwatch, gpt: torch.nn.Module, ids: torch.Tensor, device: torch.device
) -> Calibration:
    hessians = watch.time(
        "hessians",
        lambda: collect_hessians(gpt, ids[:, :-1].split(32), device, forward=gpt.features),
    )
    batches = ((part[:, :-1], part[:, 1:]) for part in ids.split(8))
    energies = watch.time(
        "output energies",
        lambda: collect_output_energies(gpt, batches, device, gpt.token_losses),
    )
    return Calibration(hessians, energies)


def _entropies(stored: dict[str, StoredTensor]) -> dict[str, int]:
    """Bytes of the streams of codes: entropy without context, and what rans' model predicts."""
    table = make_table(stored)
    raw, plans = to_streams(table, stored), plan_streams(table)
    names = [name for name, plan in plans.items() if plan.is_codes]
    entropies = {
        "order0": round(sum(order0_bytes(raw[name]) for name in names)),
        "rans_predicts": round(
            sum(predicted_bytes(raw[name], code_layout(plans[name])) for name in names)
        ),
    }
    for name, num_bytes in entropies.items():
        print(f"{name:<24}{num_bytes:>13,} bytes")
    return entropies


def _codec(watch: Stopwatch, codec: str, stored: dict[str, StoredTensor]) -> int:
    """Time a codec on the streams of codes alone; return their packed bytes."""
    table = make_table(stored)
    raw, plans = to_streams(table, stored), plan_streams(table)
    names = [name for name, plan in plans.items() if plan.is_codes]

    def pack() -> dict[str, bytes]:
        return {name: compress(codec, raw[name], code_layout(plans[name])) for name in names}

    packed = watch.time(f"pack {codec}", pack)

    def unpack() -> None:
        for name in names:
            layout = code_layout(plans[name])
            assert decompress(codec, packed[name], len(raw[name]), layout) == raw[name]

    watch.time(f"unpack {codec}", unpack)
    return sum(map(len, packed.values()))


if __name__ == "__main__":
    main()
