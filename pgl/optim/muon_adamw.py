"""One optimizer for a whole model: Muon for the matrices, AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from pgl.optim.adamw import AdamWBucket, GradientMean
from pgl.optim.clip import clip_coefficient, gradient_norm
from pgl.optim.momentum import MomentumFormat
from pgl.optim.muon_group import MuonBucket, MuonGroup
from pgl.optim.ranks import Ranks
from pgl.optim.settings import check_groups, check_state, complete_group

Clip = Literal["reduced", "local"]


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in parameter groups of one optimizer, so that a training step is one step.

    Each group is a dict with ``params``, ``kind`` ("muon" or "adamw") and ``name``, plus any
    setting of that kind; the others take the values of ``MUON_DEFAULTS`` or ``ADAMW_DEFAULTS``.
    ``lr``, ``momentum`` and all other settings are read from the group at every step, so a schedule
    just writes them. ``initial_lr`` keeps the rate the group was made with.

    Matrices of a Muon group that share a shape are orthogonalised as one batch. With several
    processes each rank keeps the momentum of a slice of every batch, orthogonalises it, and the
    results are gathered while the others are still being computed; replicas stay bit-identical.
    Gradients are either averaged before (DDP), or here (``reduce_gradients``, Parallel Muon of PR
    #399): each rank gets the mean of its slice only, by reduce-scatter.

    State exists from construction on. :meth:`state_dict` is that of this rank; after
    :meth:`consolidate_state_dict` it is whole, and the same for any number of ranks.

    A Muon matrix without a gradient gets no update and keeps its momentum but is still decayed
    (PR #236); an AdamW parameter without a gradient is left alone. A parameter must have a gradient
    on all ranks or on none.

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
            for no clipping. The gradients themselves (``p.grad``) are not clipped.
        clip: Which gradient is clipped: the "reduced" one, or each rank's "local" one before it is
            averaged (PR #703). One process knows no difference.
        momentum_format: How Muon keeps its momentum: "float32", "bfloat16", or "int8" (bf16
            arithmetic, blocks of 256 int8 codes with a bf16 scale, as PR #703).
        ns_dtype: Type of the Newton-Schulz iteration.
        compile: Compile momentum and Newton-Schulz with ``torch.compile``.
        reduce_gradients: Whether gradients are those of each rank, to be averaged here. In
            ``p.grad`` the mean replaces the gradient of AdamW parameters only.
        process_group: Ranks that share the work, None for all; it must exist by now.

    Raises:
        ValueError: A setting or parameter that cannot be used.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        grad_clip_norm: float | None = None,
        clip: Clip = "reduced",
        momentum_format: MomentumFormat = "float32",
        ns_dtype: torch.dtype = torch.bfloat16,
        compile: bool = False,
        reduce_gradients: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if grad_clip_norm is not None and not grad_clip_norm > 0:
            raise ValueError(
                "model.optimizer.grad_clip_norm must be positive, or null for no clipping, got "
                f"{grad_clip_norm}."
            )
        if momentum_format not in get_args(MomentumFormat):
            raise ValueError(
                "model.optimizer.momentum_format must be one of "
                f"{', '.join(get_args(MomentumFormat))}, got {momentum_format!r}."
            )
        self._ranks = Ranks.of(process_group)
        if clip == "local" and self._ranks.count > 1 and not reduce_gradients:
            raise ValueError(
                "model.optimizer.clip is local, but DDP averages gradients before the optimizer "
                "sees them: set trainer.strategy to parallel_muon, or model.optimizer.clip to "
                "reduced."
            )
        self.grad_clip_norm = grad_clip_norm
        self.clip = clip
        self.momentum_format = momentum_format
        self.grad_norm = torch.full((), float("nan"))
        """Norm of the last step's gradient before clipping, 0-d; NaN before the first step. With
        ``clip="local"`` that of this rank's own gradient."""
        self.global_norm = self.grad_norm
        """As ``grad_norm``, but finite only if it is on all ranks, whatever ``clip``."""
        self.skip_nonfinite = False
        """Whether a step whose ``global_norm`` is not finite leaves weights and state as they were.
        It takes a copy of them in each step, and no wait of the host for the device."""
        self._ns_dtype = ns_dtype
        self._compile = compile
        self._reduces = reduce_gradients and self._ranks.count > 1
        self._gradient_mean: GradientMean | None = None
        # By position of the group: loading a state dict replaces the group dicts.
        self._groups: list[MuonGroup | list[AdamWBucket]] = []
        self._state_shapes: dict[Tensor, dict[str, torch.Size]] = {}
        self._whole_state: dict[Tensor, dict[str, Tensor]] = {}
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state.

        Raises:
            ValueError: The group lacks a kind or name, has an unknown setting, or a Muon parameter
                is not a matrix.
        """
        group = complete_group(param_group)
        super().add_param_group(group)
        parameters = self.param_groups[-1]["params"]
        if group["kind"] == "adamw":
            self._groups.append([AdamWBucket(members) for members in _by_type(parameters)])
            if self._reduces:
                self._gradient_mean = GradientMean(self._adamw_parameters(), self._ranks)
        else:
            for parameter in parameters:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon group {group['name']!r} holds a parameter of shape "
                        f"{tuple(parameter.shape)}; only matrices can be orthogonalised, put it "
                        "into an AdamW group."
                    )
            self._groups.append(
                MuonGroup(
                    parameters, self.momentum_format, self._ns_dtype, self._compile, self._ranks
                )
            )
        self._publish_state(self._groups[-1])

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
        self._whole_state = {}
        kept = self._copies() if self.skip_nonfinite else []
        grad_scale = self._reduce_and_clip() if self._reduces else self._collect_and_clip()
        muon = [(g, s) for g, s in self._work() if isinstance(g, MuonGroup)]
        for group, settings in muon:
            group.launch(settings, grad_scale)
        # AdamW runs while the last updates are on the wire.
        if self._gradient_mean is not None:
            self._gradient_mean.finish()
        for group, settings in self._work():
            if not isinstance(group, MuonGroup):
                for bucket in group:
                    bucket.step(settings, grad_scale)
        for group, settings in muon:
            group.finish(settings)
        for tensor, copy in kept:
            torch.where(self.global_norm.isfinite(), tensor, copy, out=tensor)
        return loss

    def consolidate_state_dict(self) -> None:
        """Gather the momentum of all ranks: until the next step :meth:`state_dict` is whole.

        All ranks must call it. Lightning does before it writes a checkpoint.
        """
        if self._ranks.count == 1:
            return
        for bucket in self._muon_buckets():
            states = bucket.gathered_state()
            self._whole_state.update(zip(bucket.parameters, states, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return settings and state, without the momentum of other ranks if not consolidated."""
        state_dict = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        state = {i: self._whole_state.get(p, self.state.get(p)) for i, p in enumerate(parameters)}
        state_dict["state"] = {i: tensors for i, tensors in state.items() if tensors is not None}
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into this optimizer's own tensors, exactly.

        Args:
            state_dict: A whole state, or one that this rank made with the same number of ranks.

        Raises:
            ValueError: The state is of other groups, parameters or another ``momentum_format``.
        """
        saved_groups = state_dict["param_groups"]
        check_groups(saved_groups, self.param_groups)
        own_state = self.state
        # The base class takes over the groups; the state it would cast to the parameter's type and
        # put in place of the stacked tensors, which are filled below instead.
        super().load_state_dict({**state_dict, "state": {}})
        self.state = own_state
        self._whole_state = {}
        saved_ids = [i for group in saved_groups for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            saved, own = state_dict["state"].get(saved_id), own_state.get(parameter)
            if saved is None and own is None:
                continue  # another rank's momentum, and the state is of this rank alone
            check_state(saved or {}, self._state_shapes[parameter], self.momentum_format)
            for name, tensor in (own or {}).items():
                tensor.copy_(saved[name])

    def momentum_bytes(self) -> int:
        """Return the bytes that Muon's momentum takes on this rank."""
        return sum(
            stack.nbytes
            for bucket in self._muon_buckets()
            for stack in bucket.momentum.stacks.values()
        )

    def momentum_bytes_saved(self) -> int:
        """Return how many bytes ``momentum_format`` saves this rank against float32 momentum."""
        values = sum(len(b.own) * b.parameters[0].numel() for b in self._muon_buckets())
        return 4 * values - self.momentum_bytes()

    def _collect_and_clip(self) -> Tensor | None:
        """Take gradients that are the same on all ranks, and return the factor that clips them."""
        self.grad_norm = self.global_norm = self._norm_of_gradients()
        for group, _ in self._work():
            if isinstance(group, MuonGroup):
                for bucket in group.buckets:
                    bucket.collect()
        if self.grad_clip_norm is None:
            return None
        return clip_coefficient(self.grad_norm, self.grad_clip_norm)

    def _reduce_and_clip(self) -> Tensor | None:
        """Start to average the ranks' gradients, and return the factor that clips the mean.

        A global norm is known only when all reductions are done, so clipping the mean has to wait
        for them; clipped locally, the first bucket starts as soon as it is there.
        """
        factor: float | Tensor = 1.0 / self._ranks.count
        if self.clip == "local":
            self.grad_norm = self._norm_of_gradients()
            self.global_norm = self.grad_norm.clone()
            shared = self._ranks.all_reduce(self.global_norm)
            if self.grad_clip_norm is not None:
                factor = factor * clip_coefficient(self.grad_norm, self.grad_clip_norm)
        for bucket in self._muon_buckets():
            bucket.reduce(factor)
        if self._gradient_mean is not None:
            self._gradient_mean.launch(factor)
        if self.clip == "local":
            shared.wait()
            return None
        self.grad_norm = self.global_norm = self._norm_of_means()
        if self.grad_clip_norm is None:
            return None
        return clip_coefficient(self.grad_norm, self.grad_clip_norm)

    def _norm_of_gradients(self) -> Tensor:
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return gradient_norm(gradients, parameters[0].device)

    def _norm_of_means(self) -> Tensor:
        """Return the norm of the mean gradient, whose matrices are spread over the ranks."""
        device = self.param_groups[0]["params"][0].device
        if self._gradient_mean is not None:
            self._gradient_mean.finish()
        small = [p.grad for p in self._adamw_parameters() if p.grad is not None]
        squares = gradient_norm([b.gradients() for b in self._muon_buckets()], device).square()
        self._ranks.all_reduce(squares).wait()
        return (squares + gradient_norm(small, device).square()).sqrt()

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        """Return all that a step changes, with copies; Muon's momentum by stacks."""
        tensors = [p.data for group in self.param_groups for p in group["params"]]
        tensors += [s for b in self._muon_buckets() for s in b.momentum.stacks.values()]
        tensors += [s for p in self._adamw_parameters() for s in self.state[p].values()]
        return [(tensor, tensor.clone()) for tensor in tensors]

    def _work(self) -> list[tuple[MuonGroup | list[AdamWBucket], dict[str, Any]]]:
        return list(zip(self._groups, self.param_groups, strict=True))

    def _muon_buckets(self) -> list[MuonBucket]:
        return [b for group in self._groups if isinstance(group, MuonGroup) for b in group.buckets]

    def _adamw_parameters(self) -> list[Tensor]:
        return [
            parameter
            for group in self._groups
            if not isinstance(group, MuonGroup)
            for bucket in group
            for parameter in bucket.parameters
        ]

    def _publish_state(self, group: MuonGroup | list[AdamWBucket]) -> None:
        for bucket in group.buckets if isinstance(group, MuonGroup) else group:
            is_muon = isinstance(bucket, MuonBucket)
            own = bucket.own if is_muon else range(len(bucket.parameters))
            for index, parameter in enumerate(bucket.parameters):
                if index in own:
                    self.state[parameter] = bucket.state(index)
                self._state_shapes[parameter] = (
                    bucket.state_shapes()
                    if is_muon
                    else {name: tensor.shape for name, tensor in bucket.state(index).items()}
                )


def _by_type(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Split parameters by type and device; order is kept."""
    parts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        parts.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return list(parts.values())
