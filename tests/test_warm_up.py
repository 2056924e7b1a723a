"""Warm-up runs real steps of the real shape, in every variant, and puts everything back."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision

from pgl.module import GolfModule
from pgl.warm_up import compiled_graphs, warm_up


@pytest.fixture
def module(tiny_gpt, monkeypatch):
    module = GolfModule(tiny_gpt)
    optimizer = module.configure_optimizers()
    monkeypatch.setattr(module, "optimizers", lambda use_pl_optimizer: optimizer)
    return module


def fake_trainer(data, training_step, enable_validation=False):
    return SimpleNamespace(
        datamodule=data,
        precision_plugin=Precision(),
        strategy=SimpleNamespace(training_step=training_step),
        enable_validation=enable_validation,
    )


def test_it_runs_steps_and_leaves_no_trace(module, tiny_data):
    optimizer = module.optimizers(use_pl_optimizer=False)
    shapes, changed = [], []
    module.mile_gamma.fill_(0.75)  # a buffer that no state dict holds
    before = {name: t.clone() for name, t in tensors_of(module)}
    pointers = {name: t.data_ptr() for name, t in tensors_of(module)}
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)

    def training_step(tokens, batch_idx):
        shapes.append((tokens.shape, tokens.dtype))
        changed.append(not torch.equal(module.gpt.tok_emb.weight, before["gpt.tok_emb.weight"]))
        module.mile_gamma.fill_(0.5)
        return module.training_step(tokens, batch_idx)

    torch.manual_seed(3)
    warm_up(fake_trainer(tiny_data, training_step), module, steps=3)
    assert shapes == [(torch.Size([2, 33]), torch.int32)] * 3
    assert changed == [False, True, True], "the optimizer did not step"
    assert torch.equal(torch.rand(4), expected)
    after = dict(tensors_of(module))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    # In place: what holds a reference to a weight, such as a compiled graph, keeps it.
    assert {name: t.data_ptr() for name, t in after.items()} == pointers
    optimizer_after = optimizer.state_dict()
    torch.testing.assert_close(optimizer_after["state"], optimizer_before["state"], rtol=0, atol=0)
    assert optimizer_after["param_groups"] == optimizer_before["param_groups"]
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    assert not module.step_losses


def test_every_variant_gets_its_steps(module, tiny_data):
    now, seen = [], []

    @contextmanager
    def variant(name):
        now.append(name)
        yield
        now.pop()

    def training_step(tokens, batch_idx):
        seen.append(now[-1] if now else "as it is")
        return module.training_step(tokens, batch_idx)

    variants = [lambda: variant("rounded"), lambda: variant("other")]
    warm_up(fake_trainer(tiny_data, training_step), module, 2, variants)
    assert seen == ["as it is"] * 2 + ["rounded"] * 2 + ["other"] * 2


def test_validation_is_primed_in_its_shapes_and_scores_nothing(module, tiny_data):
    tiny_data.prepare_data()
    tiny_data.setup("validate")
    tiny_data.val_windows = lambda: tiny_data.window_loader(32, 8)
    modes, shapes = [], []
    score = module.score_batch

    def score_batch(gpt, batch):
        modes.append((gpt.training, torch.is_grad_enabled()))
        shapes.append((tuple(batch.tokens_BS1.shape), batch.last))
        return score(gpt, batch)

    module.score_batch = score_batch
    module.train()
    warm_up(fake_trainer(tiny_data, module.training_step, True), module, 1)
    loader = tiny_data.val_dataloader()
    assert shapes == list(
        dict.fromkeys((tuple(batch.tokens_BS1.shape), batch.last) for batch in loader)
    )
    assert len(shapes) == 2  # the first window, which is scored whole, and all others
    assert set(modes) == {(False, False)}
    assert all(part.training for part in module.modules())


def test_graphs_are_counted():
    torch._dynamo.reset()
    before = compiled_graphs()
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    double(torch.ones(3))
    double(torch.ones(3))
    assert compiled_graphs() == before + 1
    double(torch.ones(4))
    assert compiled_graphs() == before + 2
    torch._dynamo.reset()


def tensors_of(module):
    yield from ((name, p.detach()) for name, p in module.named_parameters())
    yield from module.named_buffers()
