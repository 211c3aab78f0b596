"""The memory planner: a training step's peak before it is run, and chunks for a budget."""

from varstream.planner.plan import MemoryPlan, plan_memory

__all__ = ["MemoryPlan", "plan_memory"]
