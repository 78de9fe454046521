"""Selection policies: which samples to spend a budget on. Arrays in, positions out."""

from selector.policies import ranking
from selector.policies.base import POLICIES, Policy, Pool, run_policy
from selector.policies.budget import Budget

__all__ = ["POLICIES", "Budget", "Policy", "Pool", "ranking", "run_policy"]
