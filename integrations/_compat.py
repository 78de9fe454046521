"""What older hosts do otherwise; each part says which host needs it and goes when that host is no longer supported."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def pair_inputs(trainer: Any, inputs: Any) -> Any:
    """A batch of preference pairs as one tensor: chosen sequences first, then rejected ones, padded on the right.

    TRL 0.24 still keeps prompts and completions apart until it takes the loss; later collators join them.

    Args:
        trainer: a DPO trainer.
        inputs: what its collator makes.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask`, and what else the batch holds.
    """
    if "completion_mask" in inputs:
        return inputs
    rows, masks = [], []
    for side in ("chosen", "rejected"):
        parts = [(inputs[f"{part}_input_ids"], inputs[f"{part}_attention_mask"].bool()) for part in ("prompt", side)]
        for prompt, prompt_kept, completion, completion_kept in zip(*parts[0], *parts[1], strict=True):
            prompt, completion = prompt[prompt_kept], completion[completion_kept]
            kept = slice(None, trainer.max_length)
            if trainer.max_length is not None and trainer.truncation_mode == "keep_end":
                kept = slice(-trainer.max_length, None)
            rows.append(torch.cat([prompt, completion])[kept])
            masks.append(torch.cat([torch.zeros_like(prompt), torch.ones_like(completion)])[kept])
    joined = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
    }
    apart = [f"{part}_{what}" for part in ("prompt", "chosen", "rejected") for what in ("input_ids", "attention_mask")]
    return {name: value for name, value in inputs.items() if name not in apart} | joined
