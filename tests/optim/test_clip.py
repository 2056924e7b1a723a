"""The clip against torch's own."""

import torch
from torch.nn import Parameter

from pgl.optim.clip import clip_coefficient, gradient_norm


def parameters(scale: float) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3,), (), (4, 4)]
    made = [Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return made


CPU = torch.device("cpu")


def gradients(parameters: list[Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters]


def test_norm_and_coefficient_equal_torch() -> None:
    for scale in (1e-3, 1.0, 50.0):
        ours, theirs = parameters(scale), parameters(scale)
        norm = gradient_norm(gradients(ours), CPU)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.3))
        coefficient = clip_coefficient(norm, 0.3)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad * coefficient, b.grad)


def test_small_gradients_are_left_exactly_alone() -> None:
    assert clip_coefficient(gradient_norm(gradients(parameters(1e-3)), CPU), 0.3).item() == 1.0


def test_bf16_gradients_get_a_float32_norm() -> None:
    parameter = Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    parameter.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    mixed = [parameter, *parameters(1.0)]
    exact = sum((p.grad.double() ** 2).sum() for p in mixed).sqrt()
    norm = gradient_norm(gradients(mixed), CPU)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_no_gradients_at_all() -> None:
    assert gradient_norm([], CPU).item() == 0.0
    assert gradient_norm([torch.zeros(0, 3, 4)], CPU).item() == 0.0
