"""A recipe with each technique off in turn, and any other trial beside it."""

from pgl.ablation.switches import SWITCHES, Switch
from pgl.ablation.trials import Trial, plan_trials

__all__ = ["SWITCHES", "Switch", "Trial", "plan_trials"]
