"""The whole model is one graph: no graph break, and no recompilation but the ones wanted."""

import pytest
import torch
from torch import Tensor

from pgl.model import GPT
from pgl.model.linear import CastedLinear
from tests.parity.recipes import PRS, randomize, shallow, tiny


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch() -> tuple[Tensor, Tensor]:
    ids_BT = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


def compiled_losses(gpt: GPT, backend: str = "eager"):
    return torch.compile(gpt.token_losses, fullgraph=True, dynamic=False, backend=backend)


def set_qat(gpt: GPT, clip: int | None) -> None:
    for module in gpt.modules():
        if isinstance(module, CastedLinear):
            module.qat_clip = clip


def check_one_graph(gpt: GPT) -> None:
    ids, targets = batch()
    loss = compiled_losses(gpt)(ids, targets)
    torch.testing.assert_close(loss, gpt.token_losses(ids, targets))
    loss.mean().backward()
    assert all(p.grad is not None for p in gpt.parameters())


@pytest.mark.parametrize("pr", PRS)
def test_shallow_recipe_is_one_graph(pr: str) -> None:
    check_one_graph(randomize(GPT(shallow(pr))))


@pytest.mark.slow
@pytest.mark.parametrize("pr", PRS)
def test_recipe_is_one_graph(pr: str) -> None:
    check_one_graph(randomize(GPT(tiny(pr))))


def test_every_other_switch_is_one_graph() -> None:
    config = shallow(
        "703",
        value_residual=True,
        gated_attention=True,
        tie_embeddings=False,
        document_mask=True,
        attention_backend="math",
    )
    gpt = randomize(GPT(config))
    ids, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled_losses(gpt)(ids, targets, last=4)
        torch.testing.assert_close(loss, gpt.token_losses(ids, targets, last=4))


@pytest.mark.slow
@pytest.mark.parametrize("pr", PRS)
def test_recipe_compiles_to_kernels(pr: str) -> None:
    gpt = randomize(GPT(shallow(pr)))
    ids, targets = batch()
    gpt.token_losses(ids, targets).mean().backward()
    expected = {name: p.grad.clone() for name, p in gpt.named_parameters()}
    gpt.zero_grad()
    loss = compiled_losses(gpt, "inductor")(ids, targets)
    torch.testing.assert_close(loss, gpt.token_losses(ids, targets), atol=1e-4, rtol=1e-4)
    loss.mean().backward()
    for name, p in gpt.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name


def test_quantisation_aware_training_reaches_the_compiled_graph() -> None:
    gpt = randomize(GPT(shallow("324", num_layers=2))).train()
    ids, targets = batch()
    compiled = compiled_losses(gpt)
    plain = compiled(ids, targets)
    set_qat(gpt, 15)
    rounded = compiled(ids, targets)
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(rounded, gpt.token_losses(ids, targets))

    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            set_qat(gpt, None)
            torch.testing.assert_close(compiled(ids, targets), plain)
            set_qat(gpt, 15)
            torch.testing.assert_close(compiled(ids, targets), rounded)
        set_qat(gpt, 31)
        with pytest.raises(RuntimeError):
            compiled(ids, targets)


def test_steps_do_not_recompile() -> None:
    gpt = GPT(shallow("703"))
    compiled = compiled_losses(gpt)
    ids, targets = batch()
    compiled(ids, targets).mean().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(3):
            compiled((ids + step) % 64, targets).mean().backward()
            with torch.no_grad():
                for p in gpt.parameters():
                    p.sub_(0.01 * p.grad)
                    p.grad = None
