"""Second moments of the inputs of linear layers, which GPTQ calibrates with.

Shape legend: N tokens of a batch, C columns (inputs of the layer).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pgl.quant.precision import full_float32


@torch.no_grad()
def collect_hessians(
    model: nn.Module,
    batches: Iterable[Tensor],
    device: torch.device | str,
    forward: Callable[[Tensor], object] | None = None,
) -> dict[str, Tensor]:
    """Run calibration batches and return the mean of X^T X over them for each linear layer.

    Layers that are called with the very same tensor one after the other (query, key and value
    projections) share one Hessian, computed once. The products are true float32 even under
    autocast; PR #703 rounds each batch's to bfloat16 by oversight.

    Args:
        model: An eager model with `nn.Linear` layers; it is run in evaluation mode and returned to
            the mode it was in. The autocast that holds around the call applies to its forward.
        batches: Token ids, or whatever `forward` takes.
        device: Where the batches are moved; the model has to be there.
        forward: What to call, e.g. ``gpt.features`` to save the head; None calls the model.

    Returns:
        Float32 Hessians (C, C) on `device` by parameter name ("blocks.0.attn.c_q.weight"). A layer
        that was never called has none.

    Raises:
        ValueError: There are no batches.
    """
    sums: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    latest: list[tuple[Tensor, str]] = []

    def record(name: str, x: Tensor) -> None:
        if latest and x is latest[0][0]:
            owner = latest[0][1]
        else:
            owner = name
            latest[:] = [(x, name)]
            _accumulate(sums, name, x)
        first_owner = owners.setdefault(name, owner)
        assert first_owner == owner, f"{name} shares its input in some batches only"

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    was_training = model.training
    num_batches = 0
    try:
        model.eval()
        for batch in batches:
            (forward or model)(batch.to(device))
            num_batches += 1
            latest.clear()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not num_batches:
        raise ValueError("no calibration batches: GPTQ needs at least one")
    for hessian_CC in sums.values():
        hessian_CC /= num_batches
    return {f"{name}.weight": sums[owner] for name, owner in owners.items()}


def _accumulate(sums: dict[str, Tensor], name: str, x: Tensor) -> None:
    with full_float32(x.device.type):
        x_NC = x.flatten(0, -2).float()
        if name not in sums:
            sums[name] = x_NC.new_zeros(x_NC.shape[1], x_NC.shape[1])
        sums[name].addmm_(x_NC.T, x_NC)
