"""Quantisation on the GPU gives what it gives on the CPU."""

import pytest
import torch

from pgl.model import GPT, GPTConfig
from pgl.quant import (
    Calibration,
    QuantConfig,
    RowGrid,
    TensorRule,
    collect_hessians,
    gptq,
    quantization_losses,
    quantize_rows,
    quantize_state,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("clip", ["max", "quantile", "search"])
def test_rows(clip):
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.2
    grid = RowGrid(clip=clip, scale_floor=None)
    on_cpu, on_gpu = quantize_rows(w, grid), quantize_rows(w.cuda(), grid)
    assert (on_gpu.codes_RC.cpu() == on_cpu.codes_RC).float().mean() > 0.9999
    torch.testing.assert_close(on_gpu.scale_R.cpu(), on_cpu.scale_R, rtol=1e-3, atol=0)


@pytest.mark.parametrize("tf32", ["highest", "medium"])
def test_gptq(tf32):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 96, 256, generator=generator) * 0.1
    x = torch.randn(3, 2000, 256, generator=generator)
    x = x @ torch.randn(256, 256, generator=generator)
    hessian = x.mT @ x
    on_cpu = gptq(w, hessian, RowGrid(clip="search"))
    torch.set_float32_matmul_precision(tf32)
    try:
        on_gpu = gptq(w.cuda(), hessian.cuda(), RowGrid(clip="search"))
        assert torch.get_float32_matmul_precision() == tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    # One tie that breaks the other way changes what follows in its row.
    assert (on_gpu.codes_RC.cpu() == on_cpu.codes_RC).float().mean() > 0.98


def test_calibrate_and_quantise_a_model():
    config = GPTConfig(vocab_size=64, num_layers=2, model_dim=128, num_heads=2, num_kv_heads=1)
    gpt = GPT(config).cuda()
    ids = torch.randint(64, (8, 256))
    with torch.autocast("cuda", torch.bfloat16):
        hessians = collect_hessians(gpt, [ids, ids], "cuda", gpt.features)
    assert all(h.dtype == torch.float32 and h.is_cuda for h in hessians.values())
    state = {name: torch.randn(p.shape) * 0.1 for name, p in gpt.state_dict().items()}
    rule = TensorRule(method="gptq", grid=RowGrid(clip="search"))
    config = QuantConfig(attention=rule, mlp=rule, passthrough_max_numel=4096)
    stored = quantize_state(state, config, Calibration(hessians), device="cuda")
    rounded = quantize_state(state, QuantConfig(passthrough_max_numel=4096), device="cuda")
    assert all(tensor.data.device.type == "cpu" for tensor in stored.values())
    better = quantization_losses(state, stored, hessians)
    worse = quantization_losses(state, rounded, hessians)
    for name in hessians:
        assert better[name].output_relative < worse[name].output_relative
