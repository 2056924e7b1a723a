"""Optimizer, its parameter routing and the schedules that steer it."""

from pgl.optim.groups import OptimizerConfig, build_optimizer, parameter_groups, route
from pgl.optim.int8_momentum import dequantize_blocks, quantize_blocks
from pgl.optim.muon_adamw import MuonAdamW
from pgl.optim.newton_schulz import zeropower
from pgl.optim.schedules import (
    Progress,
    ScheduleConfig,
    intervals_done,
    lr_scale,
    mile_gamma,
    muon_momentum,
    scaled_decay,
    scaled_steps,
    swa_due,
)

__all__ = [
    "MuonAdamW",
    "OptimizerConfig",
    "Progress",
    "ScheduleConfig",
    "build_optimizer",
    "dequantize_blocks",
    "intervals_done",
    "lr_scale",
    "mile_gamma",
    "muon_momentum",
    "parameter_groups",
    "quantize_blocks",
    "route",
    "scaled_decay",
    "scaled_steps",
    "swa_due",
    "zeropower",
]
