"""From scores to a selection, its random control, and the comparison of selections."""

from selector.selecting.compare import Comparison, compare
from selector.selecting.control import matched_random
from selector.selecting.run import select

__all__ = ["Comparison", "compare", "matched_random", "select"]
