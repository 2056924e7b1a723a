"""A compiled model whose blocks use the kernels, against the plain model."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from pgl import kernels
from pgl.model import GPT, GPTConfig
from pgl.model import gpt as gpt_module
from pgl.model.mlp import MLP
from tests.model.flash_attention import install

# On a GPU the MLP's kernel takes whole tiles of 16-bit tensors only; the interpreter is slow.
ON_GPU = torch.cuda.is_available()
HIDDEN, LENGTH = (256, 64) if ON_GPU else (64, 8)
# Of losses and of gradients, in bfloat16 and in float32.
TOLERANCE, GRADIENT_TOLERANCE = (5e-2, 5e-2) if ON_GPU else (1e-4, 1e-3)
CONFIG = GPTConfig(
    num_layers=3,
    model_dim=256 if ON_GPU else 32,
    num_heads=4,
    num_kv_heads=2,
    mlp_hidden=HIDDEN,
    mlp_activation="leaky_relu2",
    xsa_last_layers=1,
    cache_layer=1,
    backout=True,
    rope_dims=4,
    value_embedding_layers=[2],
    ln_scale=True,
    smear_gate=True,
    bigram_buckets=32,
    bigram_dim=8,
)


@pytest.fixture
def use_kernels(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    torch._dynamo.reset()  # each layer that is changed compiles anew, and their number is limited
    if not ON_GPU:
        from pgl.kernels import squared_mlp

        tiles = squared_mlp.Tiles(n=16, f=64, e=16, parts=1, warps=4, stages=2, programs=2)
        monkeypatch.setattr(squared_mlp, "FORWARD_TILES", tiles)
        monkeypatch.setattr(squared_mlp, "BACKWARD_TILES", tiles)
        monkeypatch.setattr(kernels, "available", lambda device: True)
        monkeypatch.setattr(kernels, "squared_mlp_available", lambda device: True)
        monkeypatch.setattr(MLP, "_fits", lambda mlp, x: x.shape[:-1].numel() % tiles.n == 0)
    with torch.autocast(kernel_device.type, torch.bfloat16, enabled=ON_GPU):
        yield kernel_device


def randomized(device: torch.device, config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(config).to(device)
    for parameter in gpt.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return gpt


def calls_of(graphs: list[torch.fx.GraphModule]) -> set[str]:
    targets = (node.target for graph in graphs for node in graph.graph.nodes)
    return {str(target) for target in targets if str(target).startswith("pgl.")}


@pytest.mark.parametrize("backend", ["auto", "fa4"])
def test_losses_and_gradients_are_those_of_the_plain_model(
    use_kernels: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "fa4" and ON_GPU:
        pytest.importorskip("flash_attn.cute", reason="FlashAttention-4: pip install flash-attn-4")
    elif backend == "fa4":
        stand_in = install(monkeypatch)
        monkeypatch.setattr(gpt_module, "prepare_backend", lambda backend, device: None)
    gpt, plain_gpt = (
        randomized(use_kernels, replace(CONFIG, attention_backend=name))
        for name in (backend, "auto")
    )
    ids_BT = torch.randint(1024, (2, LENGTH), device=use_kernels)
    targets_BT = ids_BT.roll(-1, 1)

    def run(
        gpt: GPT, token_losses: Callable[..., torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        gpt.zero_grad(set_to_none=True)
        losses_BT = token_losses(ids_BT, targets_BT)
        losses_BT.mean().backward()
        return losses_BT.detach(), {name: p.grad for name, p in gpt.named_parameters()}

    plain_BT, plain = run(plain_gpt, plain_gpt.token_losses)
    gpt.prepare(use_kernels)
    assert all(block.kernels for block in gpt.blocks)
    compiled = torch.compile(gpt.token_losses, backend="aot_eager", fullgraph=True)
    fused_BT, fused = run(gpt, compiled)
    if backend == "fa4" and not ON_GPU:
        # One query head of each group of two at a time, in all three layers.
        assert stand_in.backward_groups == [1] * 2 * CONFIG.num_layers
    torch.testing.assert_close(fused_BT, plain_BT, rtol=TOLERANCE, atol=TOLERANCE)
    with torch.autocast(use_kernels.type, enabled=False):
        exact = run(plain_gpt, plain_gpt.token_losses)[1]
    for name, wanted in exact.items():
        # In 16 bits the plain model is off as well, and for some gains by more than the tolerance.
        rounding = float((plain[name] - wanted).abs().max())
        allowed = GRADIENT_TOLERANCE * (float(wanted.abs().max()) + 1e-8) + rounding
        assert float((fused[name] - wanted).abs().max()) < allowed, name


def test_the_compiled_graph_calls_the_kernels(use_kernels: torch.device) -> None:
    gpt = randomized(use_kernels)
    gpt.prepare(use_kernels)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    ids_BT = torch.randint(1024, (2, LENGTH), device=use_kernels)
    with torch.no_grad():
        torch.compile(gpt.token_losses, backend=keep, fullgraph=True)(ids_BT, ids_BT)
    names = {call.split(".")[1] for call in calls_of(graphs)}
    assert names == {
        "exclusive_attention",
        "qk_norm_rope",
        "mix_norm",
        "residual_norm",
        "squared_mlp",
    }


def test_kernels_off_leaves_them_out(
    use_kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIG, "kernels", "off")
    gpt = randomized(use_kernels)
    gpt.prepare(use_kernels)
    assert not any(block.kernels or block.attn.kernels or block.mlp.kernels for block in gpt.blocks)


def test_fake_quantisation_reaches_the_products_of_the_kernels(use_kernels: torch.device) -> None:
    two_layers = replace(CONFIG, num_layers=2, cache_layer=0, value_embedding_layers=[])
    gpt = randomized(use_kernels, two_layers)
    gpt.prepare(use_kernels)
    ids_BT = torch.randint(1024, (2, LENGTH), device=use_kernels)
    compiled = torch.compile(gpt.token_losses, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        exact_BT = compiled(ids_BT, ids_BT)
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.fc", "mlp.proj"):
            layer = gpt.blocks[0].get_submodule(name)
            layer.qat_clip = 7
            changed_BT = compiled(ids_BT, ids_BT)
            plain_BT = gpt.token_losses(ids_BT, ids_BT)
            torch.testing.assert_close(changed_BT, plain_BT, rtol=TOLERANCE, atol=TOLERANCE)
            assert (changed_BT - exact_BT).abs().max() > 1e-3, name
            layer.qat_clip = None
