"""Selection policies: which samples to spend a budget on. Arrays in, positions out."""

from selector.policies import compose, coverage, diversity, filters, matching, quota, ranking, target
from selector.policies.base import POLICIES, Policy, Pool, run_policy
from selector.policies.budget import Budget
from selector.policies.members import MemberNeighbours

FAMILIES = (ranking, quota, filters, coverage, diversity, target, matching, compose)
"""The modules whose import registers the policies."""

__all__ = ["FAMILIES", "POLICIES", "Budget", "MemberNeighbours", "Policy", "Pool", "run_policy"]
