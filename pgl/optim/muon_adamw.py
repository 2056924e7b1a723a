"""One optimizer for a whole model: Muon for the matrices, AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from pgl.optim.adamw import AdamWBucket
from pgl.optim.clip import clip_coefficient, gradient_norm
from pgl.optim.muon import DecayOrder, MomentumFormat, MuonBucket
from pgl.optim.newton_schulz import step_coefficients

MUON_DEFAULTS: dict[str, Any] = {
    "lr": 0.025,
    "momentum": 0.99,
    "nesterov": True,
    "weight_decay": 0.0,
    "decay_order": "before",
    "ns_steps": 5,
    "ns_coefficients": "keller",
}
ADAMW_DEFAULTS: dict[str, Any] = {
    "lr": 0.025,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
}
_DEFAULTS = {"muon": MUON_DEFAULTS, "adamw": ADAMW_DEFAULTS}


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in parameter groups of one optimizer, so that a training step is one step.

    Each group is a dict with ``params``, ``kind`` ("muon" or "adamw") and ``name``, plus any
    setting of that kind; the others take the values of ``MUON_DEFAULTS`` or ``ADAMW_DEFAULTS``.
    ``lr``, ``momentum`` and all other settings are read from the group at every step, so a schedule
    just writes them. ``initial_lr`` keeps the rate the group was made with.

    Matrices of a Muon group that share a shape are orthogonalised as one batch. With several
    processes (plain DDP: gradients already averaged) momentum is replicated, each rank
    orthogonalises a slice of every batch and the results are gathered while the others are still
    being computed; replicas stay bit-identical. State exists from construction on, has the same
    keys on every rank and does not depend on the number of ranks.

    A Muon matrix without a gradient gets no update and keeps its momentum but is still decayed
    (PR #236); an AdamW parameter without a gradient is left alone.

    Example::

        optimizer = MuonAdamW(
            [
                {"kind": "muon", "name": "matrix", "params": matrices, "lr": 0.025},
                {"kind": "adamw", "name": "scalar", "params": scalars, "lr": 0.025},
            ],
            grad_clip_norm=0.3,
        )

    Args:
        params: Parameter groups.
        grad_clip_norm: Global L2 norm that the gradient of all groups together is clipped to; None
            for no clipping. The gradients themselves (``p.grad``) are not changed.
        momentum_format: How Muon keeps its momentum: "float32", "bfloat16", or "int8" (bf16
            arithmetic, blocks of 256 int8 codes with a bf16 scale, as PR #703).
        ns_dtype: Type of the Newton-Schulz iteration.
        compile: Compile momentum and Newton-Schulz with ``torch.compile``, once per shape.
        process_group: Ranks that share the Newton-Schulz work; None for all.

    Raises:
        ValueError: A setting or parameter that cannot be used.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        grad_clip_norm: float | None = None,
        momentum_format: MomentumFormat = "float32",
        ns_dtype: torch.dtype = torch.bfloat16,
        compile: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if grad_clip_norm is not None and not grad_clip_norm > 0:
            raise ValueError(
                f"grad_clip_norm must be positive, or null for no clipping, got {grad_clip_norm}."
            )
        if momentum_format not in get_args(MomentumFormat):
            raise ValueError(
                f"momentum_format must be one of {', '.join(get_args(MomentumFormat))}, "
                f"got {momentum_format!r}."
            )
        self.grad_clip_norm = grad_clip_norm
        self.momentum_format = momentum_format
        self.grad_norm = torch.full((), float("nan"))
        """Gradient norm of the last step before clipping, 0-d; NaN before the first step."""
        self._ns_dtype = ns_dtype
        self._compile = compile
        self._process_group = process_group
        # By position of the group: loading a state dict replaces the group dicts.
        self._buckets: list[list[MuonBucket] | list[AdamWBucket]] = []
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state.

        Raises:
            ValueError: The group lacks a kind or name, has an unknown setting, or a Muon parameter
                is not a matrix.
        """
        group = _complete_group(param_group)
        super().add_param_group(group)
        parameters = self.param_groups[-1]["params"]
        if group["kind"] == "adamw":
            buckets: list[Any] = [
                AdamWBucket(members) for members in _partition(parameters, by_shape=False)
            ]
        else:
            for parameter in parameters:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon group {group['name']!r} holds a parameter of shape "
                        f"{tuple(parameter.shape)}; only matrices can be orthogonalised, put it "
                        "into an AdamW group."
                    )
            buckets = [
                MuonBucket(
                    members,
                    self.momentum_format,
                    self._ns_dtype,
                    self._compile,
                    self._process_group,
                )
                for members in _partition(parameters, by_shape=True)
            ]
        self._buckets.append(buckets)
        self._publish_state(buckets)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Called first with gradients enabled; computes the loss and its gradients.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.grad_norm = gradient_norm(p for group in self.param_groups for p in group["params"])
        grad_scale = None
        if self.grad_clip_norm is not None:
            grad_scale = clip_coefficient(self.grad_norm, self.grad_clip_norm)
        work = [
            (group, bucket)
            for group, buckets in zip(self.param_groups, self._buckets, strict=True)
            for bucket in buckets
        ]
        muon = [(group, bucket) for group, bucket in work if isinstance(bucket, MuonBucket)]
        for group, bucket in muon:
            bucket.launch(group, grad_scale)
        # AdamW runs while the last updates are on the wire.
        for group, bucket in work:
            if isinstance(bucket, AdamWBucket):
                bucket.step(group, grad_scale)
        for group, bucket in muon:
            bucket.finish(group)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into this optimizer's own tensors, exactly.

        Raises:
            ValueError: The state is of other groups, parameters or another ``momentum_format``.
        """
        saved_groups = state_dict["param_groups"]
        self._check_groups(saved_groups)
        own_state = self.state
        # The base class takes over the groups; the state it would cast to the parameter's type and
        # put in place of the stacked tensors, which are filled below instead.
        super().load_state_dict({**state_dict, "state": {}})
        self.state = own_state
        saved_ids = [i for group in saved_groups for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            own = own_state[parameter]
            if saved.keys() != own.keys():
                raise ValueError(
                    f"The checkpoint's optimizer state has {sorted(saved)} where momentum_format="
                    f"{self.momentum_format!r} needs {sorted(own)}; set momentum_format to what "
                    "the checkpoint was made with."
                )
            for name, tensor in own.items():
                if saved[name].shape != tensor.shape:
                    raise ValueError(
                        f"The checkpoint's optimizer state {name!r} has shape "
                        f"{tuple(saved[name].shape)} instead of {tuple(tensor.shape)}; load it "
                        "with the model it was made with."
                    )
                tensor.copy_(saved[name])

    def momentum_bytes(self) -> int:
        """Return the bytes that Muon's momentum takes on this rank."""
        return sum(
            tensor.nbytes
            for bucket in self._muon_buckets()
            for index in range(len(bucket.parameters))
            for tensor in bucket.momentum.state(index).values()
        )

    def momentum_bytes_saved(self) -> int:
        """Return how many bytes ``momentum_format`` saves against float32 momentum."""
        values = sum(p.numel() for bucket in self._muon_buckets() for p in bucket.parameters)
        return 4 * values - self.momentum_bytes()

    def _muon_buckets(self) -> list[MuonBucket]:
        return [b for buckets in self._buckets for b in buckets if isinstance(b, MuonBucket)]

    def _publish_state(self, buckets: Iterable[MuonBucket | AdamWBucket]) -> None:
        for bucket in buckets:
            source = bucket.momentum if isinstance(bucket, MuonBucket) else bucket
            for index, parameter in enumerate(bucket.parameters):
                self.state[parameter] = source.state(index)

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        saved = [(g.get("kind"), g.get("name"), len(g["params"])) for g in saved_groups]
        own = [(g["kind"], g["name"], len(g["params"])) for g in self.param_groups]
        if saved != own:
            raise ValueError(
                f"The checkpoint's optimizer has the groups (kind, name, parameters) {saved} "
                f"instead of {own}; load it with the model and routing it was made with."
            )


def _complete_group(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group with defaults filled in, checked."""
    kind, name = group.get("kind"), group.get("name")
    if kind not in _DEFAULTS or not name:
        raise ValueError(
            "Every parameter group needs a 'kind' (muon or adamw) and a 'name', "
            f"got kind={kind!r}, name={name!r}."
        )
    defaults = _DEFAULTS[kind]
    unknown = group.keys() - defaults.keys() - {"params", "kind", "name", "initial_lr"}
    if unknown:
        raise ValueError(
            f"Group {name!r} has settings that {kind} does not know: {', '.join(sorted(unknown))}."
        )
    complete = {**defaults, **group}
    complete.setdefault("initial_lr", complete["lr"])
    if complete["lr"] < 0 or complete["weight_decay"] < 0:
        raise ValueError(f"lr and weight_decay of group {name!r} must not be negative.")
    if kind == "muon":
        step_coefficients(complete["ns_coefficients"], complete["ns_steps"])
        if complete["decay_order"] not in get_args(DecayOrder):
            raise ValueError(
                f"decay_order of group {name!r} must be before or after, "
                f"got {complete['decay_order']!r}."
            )
    return complete


def _partition(parameters: list[Tensor], by_shape: bool) -> list[list[Tensor]]:
    """Split parameters by type and device, and by shape if asked to; order is kept."""
    parts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        shape = parameter.shape if by_shape else None
        parts.setdefault((parameter.dtype, parameter.device, shape), []).append(parameter)
    return list(parts.values())
