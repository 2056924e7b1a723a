"""Any number of models and stacks can be compiled in one process."""

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks import TestTimeTraining
from pgl.compiled import compiled_copy
from pgl.model import GPTConfig
from pgl.module import GolfModule
from pgl.warm_up import compiled_graphs


@pytest.fixture(autouse=True)
def fast_compiler(monkeypatch: pytest.MonkeyPatch):
    """torch.compile's tracing, guards and limits, without the kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


def test_copies_have_a_recompile_limit_each() -> None:
    offset = 1.0

    def times(G: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return G * factor + offset

    # Ten shapes: more than Dynamo's recompile limit of one function.
    copies = [compiled_copy(times) for _ in range(10)]
    for size, copy in enumerate(copies, start=2):
        assert copy(torch.ones(size)).sum() == 3 * size


@pytest.mark.parametrize(("limit", "models"), [(1, 2), pytest.param(8, 10, marks=pytest.mark.slow)])
def test_models_of_more_sizes_than_the_limit_train_are_scored_and_adapt(
    limit: int, models: int, tiny_gpt: GPTConfig
) -> None:
    tokens_ST1 = torch.arange(18, dtype=torch.int32).view(2, 9)
    sequences = tokens_ST1[:, :-1].contiguous(), tokens_ST1[:, 1:].long()
    trainer: Any = SimpleNamespace(
        precision="32-true",
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    before = compiled_graphs()
    with torch._dynamo.config.patch(recompile_limit=limit):
        for hidden in range(1, models + 1):
            module = GolfModule(replace(tiny_gpt, mlp_hidden=hidden), compile=True)
            module._trainer = trainer
            ttt = TestTimeTraining("score_first")
            module.setup("fit")
            ttt.setup(trainer, module, "predict")  # compiles, and looks at no data
            module.training_step(tokens_ST1, 0).backward()
            module.score_batch.losses(module.gpt, *sequences, None)
            ttt._loss(module.gpt, *sequences).backward()
    assert compiled_graphs() - before == 3 * models
