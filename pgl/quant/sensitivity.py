"""How much the loss minds an error in each output of a linear layer.

Shape legend: B sequences, T positions, R outputs of a layer.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def collect_output_energies(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
    losses: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Run calibration batches forward and backward, and return each output's mean squared gradient.

    The gradient is that of a token's cross-entropy in nats. To second order (the diagonal of the
    Fisher information) an error of variance v in output r costs ``energy_r * v / 2`` nats a token.
    The output is that of the stored weight: a gain that the layer multiplies into it comes behind.

    Args:
        model: An eager model; it is run in evaluation mode and returned to the mode it was in. Its
            parameters get no gradients. The autocast that holds around the call applies.
        batches: Token ids and the tokens that follow them, both (B, T).
        device: Where the batches are moved; the model has to be there.
        losses: Gives each token's loss, e.g. ``gpt.token_losses``.

    Returns:
        Float32 energies (R,) on `device` by parameter name ("blocks.0.attn.c_q.weight").

    Raises:
        ValueError: There are no batches.
    """
    outputs: dict[str, Tensor] = {}
    gains: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[f"{name}.weight"] = output
        if len(args) > 1:  # see CastedLinear.forward
            gains[f"{name}.weight"] = args[1]

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: keep(name, args, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    was_training = model.training
    energies: dict[str, Tensor] = {}
    num_tokens = 0
    try:
        model.eval()
        for ids_BT, targets_BT in batches:
            with torch.enable_grad():
                losses_BT = losses(ids_BT.to(device), targets_BT.to(device))
                gradients = torch.autograd.grad(losses_BT.sum(), list(outputs.values()))
            for name, gradient in zip(outputs, gradients, strict=True):
                energy_R = gradient.flatten(0, -2).float().square().sum(0)
                if name in gains:
                    energy_R *= gains[name].detach().float().square()
                energies[name] = energies[name] + energy_R if name in energies else energy_R
            num_tokens += ids_BT.numel()
            outputs.clear()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not num_tokens:
        raise ValueError("no calibration batches: balanced steps need at least one")
    return {name: energy_R / num_tokens for name, energy_R in energies.items()}
