"""Warm-up runs real steps of the real shape and puts everything back."""

import copy
from types import SimpleNamespace

import torch
from lightning.pytorch.plugins import Precision

from pgl.module import GolfModule
from pgl.warm_up import warm_up


def test_it_runs_steps_and_leaves_no_trace(tiny_gpt, tiny_data, monkeypatch):
    module = GolfModule(tiny_gpt)
    optimizer = module.configure_optimizers()
    monkeypatch.setattr(module, "optimizers", lambda use_pl_optimizer: optimizer)
    shapes, changed = [], []
    before = copy.deepcopy(module.state_dict())
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(4)

    def training_step(tokens, batch_idx):
        shapes.append((tokens.shape, tokens.dtype))
        changed.append(not torch.equal(module.gpt.tok_emb.weight, before["gpt.tok_emb.weight"]))
        return module.training_step(tokens, batch_idx)

    trainer = SimpleNamespace(
        datamodule=tiny_data,
        precision_plugin=Precision(),
        strategy=SimpleNamespace(training_step=training_step),
    )
    torch.manual_seed(3)
    warm_up(trainer, module, steps=3)
    assert shapes == [(torch.Size([2, 33]), torch.int32)] * 3
    assert changed == [False, True, True], "the optimizer did not step"
    assert torch.equal(torch.rand(4), expected)
    torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], optimizer_before["state"], rtol=0, atol=0)
    assert after["param_groups"] == optimizer_before["param_groups"]
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    assert not module.step_losses
