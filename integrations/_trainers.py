"""What a trainer is, and whether the loss that it takes is the one that spectra are defined for."""

from __future__ import annotations

from typing import Any

SAMPLE_COLUMN = "selector_sample_id"
"""Column that tells rewards and rollouts which prompt they belong to."""

PLAIN_LOSSES = (None, "nll", "chunked_nll", "sigmoid", ["sigmoid"])
"""Values of `loss_type` that stand for the mean cross-entropy and for the DPO loss."""


def is_kind(trainer: Any, name: str) -> bool:
    """Whether a trainer is of this class of TRL, or derived from it."""
    return any(cls.__name__ == name for cls in type(trainer).__mro__)


def generates(trainer: Any) -> bool:
    """Whether a trainer generates what it trains on, and rewards it."""
    return hasattr(trainer, "_calculate_rewards")


def other_loss(trainer: Any) -> list[str]:
    """Settings that make a trainer's loss another one than the mean cross-entropy of a response or the DPO loss of a pair.

    Args:
        trainer: one that does not generate.
    """
    args = trainer.args

    def value(name: str, plain: Any) -> Any:
        found = getattr(args, name, plain)
        return getattr(found, "value", found)  # TRL had enumerations here before version 1

    plain: dict[str, Any] = {"label_smoothing_factor": 0, "compute_loss_func": None}
    if is_kind(trainer, "DPOTrainer"):
        plain |= {
            "label_smoothing": 0, "f_divergence_type": "reverse_kl", "use_weighting": False, "ld_alpha": None,
            "reference_free": False, "rpo_alpha": None, "ref_adapter_name": None,
        }  # fmt: skip
    reasons = [f"{name}={value(name, usual)!r}" for name, usual in plain.items() if value(name, usual) != usual]
    if value("loss_type", None) not in PLAIN_LOSSES:
        reasons.append(f"loss_type={args.loss_type!r}")
    if getattr(trainer, "compute_loss_func", None) is not None:
        reasons.append("compute_loss_func")
    return reasons
