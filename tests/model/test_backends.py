"""Attention backends: the one asked for runs, or an error says why not."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pgl import kernels
from pgl.model import GPT, backends
from pgl.model.backends import (
    KERNELS,
    QUACK_VERSION,
    attention_kernel,
    flash_reads_last,
    prepare_backend,
    prepare_quack,
)
from tests.parity.recipes import randomize, shallow

CPU = torch.device("cpu")


def test_quack_needs_a_hopper_gpu() -> None:
    gpt = GPT(shallow("703", kernels="quack", model_dim=64, mlp_hidden=128))
    with pytest.raises(ValueError, match="kernels quack needs an NVIDIA GPU of the Hopper"):
        gpt.prepare(torch.device("cpu"))


@pytest.mark.parametrize("backend", ["cudnn", "fa3", "fa4"])
def test_cuda_backends_are_refused_on_a_cpu(backend: str) -> None:
    gpt = GPT(shallow("703", attention_backend=backend))
    with pytest.raises(ValueError, match=f"attention_backend {backend} needs a CUDA device"):
        gpt(torch.zeros(1, 4, dtype=torch.long))


def test_unprepared_backend_does_not_fall_back_in_a_compiled_model() -> None:
    gpt = GPT(shallow("703", attention_backend="cudnn"))
    with pytest.raises(Exception, match=r"(?i)kernel|backend"):
        torch.compile(gpt, fullgraph=True, backend="eager")(torch.zeros(1, 4, dtype=torch.long))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="prepare"), attention_kernel("fa3"):
        pass


def test_cpu_backends_agree() -> None:
    ids = torch.randint(64, (2, 16))
    weights = randomize(GPT(shallow("703"))).state_dict()
    outputs = []
    for backend in ("auto", "math", "flash"):
        gpt = GPT(shallow("703", attention_backend=backend))
        gpt.load_state_dict(weights)
        outputs.append(gpt(ids))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-5)


def test_the_kernel_asked_for_is_the_one_that_runs() -> None:
    q = torch.randn(1, 2, 4, 8)
    with torch.profiler.profile() as profile, attention_kernel("math"):
        nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert "aten::_scaled_dot_product_attention_math" in {e.key for e in profile.key_averages()}
    with torch.profiler.profile() as profile, attention_kernel("flash"):
        nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    names = {e.key for e in profile.key_averages()}
    assert any("flash_attention" in name for name in names)


class TestOnFakeGpu:
    """The decisions on a CUDA device, without one."""

    @pytest.fixture(autouse=True)
    def _hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def test_all_but_the_missing_packages_are_accepted(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
        for backend in ("auto", "math", "cudnn", "flash"):
            prepare_backend(backend, torch.device("cuda"))
        with pytest.raises(ValueError, match="fa3 could not be activated"):
            prepare_backend("fa3", torch.device("cuda"))
        with pytest.raises(ValueError, match=r"fa4 could not be loaded.*pip install -e '.\[fa4\]'"):
            prepare_backend("fa4", torch.device("cuda"))

    def test_quack_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "squared_mlp_available", lambda device: True)
        monkeypatch.setitem(sys.modules, "pgl.kernels.quack_mlp", None)
        with pytest.raises(ValueError, match=r"quack could not be loaded.*install -e '.\[quack\]'"):
            prepare_quack(torch.device("cuda"))

    def test_another_quack(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "squared_mlp_available", lambda device: True)
        monkeypatch.setattr(kernels, "load_quack", lambda: None)
        monkeypatch.setattr(backends, "version", lambda package: "0.5.3")
        with pytest.raises(ValueError, match=f"quack-kernels {QUACK_VERSION}, not 0.5.3: pip"):
            prepare_quack(torch.device("cuda"))
        setup = Path(__file__).resolve().parents[2] / "setup.cfg"
        assert f"quack-kernels[cu13]=={QUACK_VERSION};" in setup.read_text()

    def test_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(ValueError, match=r"flash needs compute capability 8.0.*has 7.x"):
            prepare_backend("flash", torch.device("cuda"))

    @pytest.mark.parametrize(
        ("backend", "head_dim", "runs"),
        [
            *[(backend, 64, backend != "math") for backend in (*KERNELS, "fa4", "auto")],
            *[("auto", 8, True), ("auto", 12, False), ("auto", 256, True), ("auto", 264, False)],
        ],
    )
    def test_flash_reads_the_last_positions_where_it_can(
        self, backend: str, head_dim: int, runs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert flash_reads_last(backend, head_dim, torch.device("cuda")) is runs
        assert not flash_reads_last(backend, head_dim, CPU)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not flash_reads_last(backend, head_dim, torch.device("cuda"))

    def test_preparing_tells_the_layers(self) -> None:
        for head_dim, runs in ((64, True), (12, False)):
            gpt = GPT(shallow("703", model_dim=4 * head_dim, num_heads=4, kernels="off"))
            gpt.prepare(torch.device("cuda"))
            assert all(block.attn.flash_last is runs for block in gpt.blocks)

    def test_flash_attention_3_goes_through_torchs_switch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        active: list[str | None] = [None]
        monkeypatch.setattr(
            nn.attention, "activate_flash_attention_impl", lambda name: active.append(name)
        )
        monkeypatch.setattr(
            nn.attention, "restore_flash_attention_impl", lambda: active.append(None)
        )
        monkeypatch.setattr(nn.attention, "current_flash_attention_impl", lambda: active[-1])
        prepare_backend("fa3", torch.device("cuda"))
        with attention_kernel("fa3"):
            pass
        for backend in ("fa3", "flash", "flash"):
            prepare_backend(backend, torch.device("cuda"))
        assert active == [None, "FA3", None]
        with pytest.raises(RuntimeError, match="fa3 is not active"), attention_kernel("fa3"):
            pass


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*KERNELS, "fa4", "auto"])
def test_gpu_backends_agree_with_math(backend: str) -> None:
    device = torch.device("cuda")
    try:
        prepare_backend(backend, device)
    except ValueError as error:
        pytest.skip(str(error))
    config = shallow("703", model_dim=256, num_heads=4, num_kv_heads=2)
    ids = torch.randint(64, (2, 128), device=device)
    reference = randomize(GPT(replace(config, attention_backend="math"))).to(device)
    gpt = GPT(replace(config, attention_backend=backend)).to(device)
    gpt.load_state_dict(reference.state_dict())
    compiled = torch.compile(gpt, fullgraph=True, dynamic=False)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        expected = reference(ids)
        for logits in (gpt(ids), compiled(ids)):
            assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()
