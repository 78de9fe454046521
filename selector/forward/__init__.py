"""Scores for which forward passes suffice: loss ratios, hidden states and logits, one number per sample."""

from selector.forward.passes import ForwardPass, responses_alone
from selector.forward.run import ForwardScores
from selector.forward.scorers import Scorer, named_scorers, scorers

__all__ = ["ForwardPass", "ForwardScores", "Scorer", "named_scorers", "responses_alone", "scorers"]
