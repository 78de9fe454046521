"""Orders, curricula and samplers that draw a selection during training."""

from __future__ import annotations

from selector.sampling.order import Groups, deal, id_keys, weighted_order
from selector.sampling.sampler import SelectionSampler

__all__ = ["Groups", "SelectionSampler", "deal", "id_keys", "weighted_order"]
