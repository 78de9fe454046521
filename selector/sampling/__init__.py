"""Orders, curricula and samplers that draw a selection during training."""

from __future__ import annotations

from selector.sampling.adaptive import AdaptiveSampler, Signal
from selector.sampling.curricula import CURRICULA, Curriculum
from selector.sampling.order import Groups, deal, id_keys, weighted_order
from selector.sampling.sampler import SelectionSampler
from selector.sampling.signals import FocusSignal, RewardSignal
from selector.sampling.spectral import RefreshSignal, SpectrumSignal, TapSignal
from selector.sampling.state import load_state, save_state

__all__ = [
    "CURRICULA",
    "AdaptiveSampler",
    "Curriculum",
    "FocusSignal",
    "Groups",
    "RefreshSignal",
    "RewardSignal",
    "SelectionSampler",
    "Signal",
    "SpectrumSignal",
    "TapSignal",
    "deal",
    "id_keys",
    "load_state",
    "save_state",
    "weighted_order",
]
