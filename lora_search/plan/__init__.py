"""What a sweep will cost: parameters, bytes, trials on a GPU, steps, operations and time. Nothing is trained."""

from lora_search.plan.compose import plan_sweep, usual_ways
from lora_search.plan.values import BasePlan, CornerPlan, DevicePlan, Plan, SweepPlan

__all__ = ["BasePlan", "CornerPlan", "DevicePlan", "Plan", "SweepPlan", "plan_sweep", "usual_ways"]
