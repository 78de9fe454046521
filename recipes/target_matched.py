"""Pick the samples whose gradients point the way of a few target examples, in the manner of LESS.

    python recipes/target_matched.py                                            the embedded model and rows, on CPU
    accelerate launch recipes/target_matched.py --model Qwen/Qwen2.5-1.5B --data train.jsonl --target validation.jsonl

Hardware: 1 x H200 (or any GPU with 40 GiB), or several
Time:     45 minutes for 50 million tokens, estimated: the spectra's 35 and the sketches
Memory:   30 GiB, estimated; on the CPU all sketches, 16 numbers per matrix, 1.3 GB for 100,000 samples of 28 layers

Both files are scored with sketches: random projections of each layer's gradient that keep cosines. A sample is ranked by
the target that it helps most, whatever its length. LESS itself projects the Adam update of LoRA weights over several
checkpoints; here the gradient is that of the full weights at one.

Source: Xia et al. 2024, LESS (arXiv 2402.04333).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from accelerate import PartialState

import selector
from selector.assets import HELD_OUT, POOL, TINY_MODEL
from selector.data.load import load_rows


def directions(store: selector.FeatureStore) -> np.ndarray:
    """[N, D] float32: each matrix's sketch of length one, so that no layer outweighs the others; zeros where there is none."""
    sketches = np.nan_to_num(store.sketches())
    lengths = np.linalg.norm(sketches, axis=-1, keepdims=True)
    return (sketches / np.where(lengths > 0, lengths, 1)).reshape(len(sketches), -1).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_MODEL), help="path or hub name")
    parser.add_argument("--data", default=str(POOL), help="what to select from")
    parser.add_argument(
        "--target", default=str(HELD_OUT), help="a few examples of what the training should make better"
    )
    parser.add_argument("--id-column", default="id")
    parser.add_argument("--budget", default="10%", help="samples, percent or tokens: 500, 10%%, 200k tokens")
    parser.add_argument("--limit", type=int, help="score only the first so many rows of each file")
    parser.add_argument("--output", type=Path, default=Path("runs/target_matched"))
    options = parser.parse_args()

    state = PartialState()
    model, tokenizer = selector.load_model(options.model, device=state.device)
    config = selector.ScoreConfig(
        id_column=options.id_column, sketch_dimension=16, projections=("q", "k", "v", "o"), limit=options.limit
    )
    pool, target = (
        selector.score_dataset(model, tokenizer, load_rows(path), options.output / name, config)
        for name, path in (("pool", options.data), ("target", options.target))
    )
    if not state.is_main_process:
        return
    selection = selector.select(
        selector.score(pool),
        budget=options.budget,
        policy="match-target",
        vectors=directions(pool),
        target=directions(target),
    )
    selection.save(options.output / "selection.parquet")
    print(f"{options.output / 'selection.parquet'}: {len(selection):,} samples, {selection.n_tokens.sum():,} tokens")
    print(
        f"look at them: selector report {options.output / 'pool'} {options.output / 'selection.parquet'} --data {options.data}"
    )


if __name__ == "__main__":
    main()
