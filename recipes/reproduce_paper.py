"""The tables of "Data Quality through the Lens of Layer-wise Gradients" (arXiv 2504.10766), with length taken out beside.

    python recipes/reproduce_paper.py --models Qwen/Qwen2.5-1.5B --pools wizardlm openhermes magpie
    python recipes/reproduce_paper.py --models MODEL --pools rows.jsonl --metric difficulty      any rows with a column to split by

Hardware: 1 x H200 (or any GPU with 80 GiB for models up to 3B in float32)
Time:     1 hour per model of 1.5B and pool of 10,000 rows, estimated from 423 ms measured for 16 x 512 tokens
Memory:   40 GiB, estimated

As in the paper: base models in float32; 10,000 rows of each pool; `instruction + newline + response`; mean loss over the
response; q, k, v and o of every layer; the 200 rows with the highest and the 200 with the lowest value of a metric. The
paper's models: Qwen/Qwen2.5-1.5B, -3B, -7B, -14B; meta-llama/Llama-3.2-1B, -3B; meta-llama/Llama-3.1-8B; google/gemma-2-2b.

The metric `ifd`, loss of the response after its instruction over its loss alone, is computed here with each model itself;
the paper took gpt2 and Qwen2.5-7B for it. Its other metrics (InsTag, difficulty, reward) need models of their own: put
them in a column and name it. Which 10,000 rows the paper drew is not known here; these are drawn with a seed.

Besides the paper's means it prints how well each measure tells the two classes apart (AUC), raw and with length
controlled, and how well length alone does: on most pools it does nearly as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState

import selector
from selector.data.load import load_rows
from selector.scores.statistics import mean_ranks

POOLS = {
    "wizardlm": "WizardLMTeam/WizardLM_evol_instruct_70k",
    "openhermes": "teknium/OpenHermes-2.5",
    "magpie": "Magpie-Align/Magpie-Pro-300K-Filtered",
    "s1.1": "simplescaling/s1K-1.1",
}
"""Hub names of the paper's pools."""
PROJECTIONS = ("q", "k", "v", "o")
MEASURES = ("nuclear_norm", "effective_rank")


def pair(row: dict[str, Any]) -> dict[str, str]:
    """Instruction and response of a row of any of the pools."""
    if "conversations" in row:
        turns = {turn["from"]: turn["value"] for turn in reversed(row["conversations"])}
        prompt, completion = turns.get("human", ""), turns.get("gpt", "")
    elif "question" in row:
        prompt, completion = (
            row["question"],
            f"{row.get('deepseek_thinking_trajectory', '')}\n{row.get('deepseek_attempt', '')}",
        )
    else:
        prompt = row.get("instruction") or row.get("prompt") or ""
        prompt, completion = (
            f"{prompt}\n{row['input']}" if row.get("input") else prompt,
            row.get("output") or row.get("completion") or "",
        )
    return {"prompt": prompt.rstrip("\n") + "\n", "completion": completion}


def rows_of(pool: str, count: int, seed: int) -> datasets.Dataset:
    """Rows of a pool as prompts and completions, with the columns that they had and an id."""
    rows = load_rows(POOLS.get(pool, pool)).shuffle(seed=seed)
    rows = rows.select(range(min(count, len(rows))))
    taken = [name for name in ("id", "prompt", "completion") if name in rows.column_names]
    pairs = datasets.Dataset.from_list([pair(row) for row in rows])
    rows = datasets.concatenate_datasets([rows.remove_columns(taken), pairs], axis=1)
    return rows.filter(lambda row: bool(row["completion"].strip())).map(
        lambda row, i: {"id": str(i)}, with_indices=True
    )


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """Probability that a value of the first class exceeds one of the second, ties counting half."""
    ranks = mean_ranks(np.concatenate([high, low]))
    return float((ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def show(store: selector.FeatureStore, metric: np.ndarray, each: int, title: str) -> None:
    """Print the paper's table for one model and pool."""
    status = np.array(store.to_arrow(["status"])["status"].to_pylist())
    usable = np.flatnonzero((status == "ok") & np.isfinite(metric))
    order = usable[np.argsort(metric[usable], kind="stable")]
    each = min(each, len(order) // 2)
    low, high = order[:each], order[-each:]
    print(f"\n{title}: {each} highest against {each} lowest")
    tokens = store.to_arrow(["n_loss_tokens"])["n_loss_tokens"].to_numpy()
    print(
        f"  response length alone: AUC {auc(tokens[high], tokens[low]):.3f}, median {np.median(tokens[high]):.0f} against {np.median(tokens[low]):.0f} tokens"
    )
    for measure in MEASURES:
        values = store.features(measure)
        scores = selector.score(store, measure)
        sign = 1 if scores.provenance["higher_first"] else -1
        raw, controlled = (
            auc(scores.raw[high], scores.raw[low]),
            auc(sign * scores.values[high], sign * scores.values[low]),
        )
        print(f"  {measure.replace('_', ' ')}: AUC {raw:.3f} raw, {controlled:.3f} with length controlled")
        for name in PROJECTIONS:
            columns = [spec.projection == name for spec in store.layers]
            print(
                f"    {name}  high {values[high][:, columns].mean():10.4g}   low {values[low][:, columns].mean():10.4g}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="paths or hub names")
    parser.add_argument("--pools", nargs="+", required=True, help=f"files, or of {', '.join(POOLS)}")
    parser.add_argument("--metric", default="ifd", help="ifd, or a column of numbers")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of each pool")
    parser.add_argument("--each", type=int, default=200, help="rows of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce_paper"))
    options = parser.parse_args()

    config = selector.ScoreConfig(
        id_column="id",
        format="prompt-completion",
        projections=PROJECTIONS,
        truncation="truncate-completion",
        precision="high",
    )
    alone = selector.ScoreConfig(
        id_column="id",
        format="text",
        columns=("text=completion",),
        projections=("q",),
        layers=(0,),
        truncation="truncate-completion",
    )
    for name in options.models:
        model, tokenizer = selector.load_model(name, "float32", device=PartialState().device)
        for pool in options.pools:
            rows = rows_of(pool, options.rows, options.seed)
            folder = options.output / Path(name).name / Path(pool).stem
            store = selector.score_dataset(model, tokenizer, rows, folder / "features", config)
            if options.metric == "ifd":
                without = selector.score_dataset(model, tokenizer, rows, folder / "response_alone", alone)
                losses = [
                    part.to_arrow(["loss"])["loss"].cast("float64").fill_null(float("nan")).to_numpy()
                    for part in (store, without)
                ]
                metric = losses[0] / losses[1]
            else:
                metric = np.array(rows[options.metric], dtype=np.float64)
            show(store, metric, options.each, f"{name}, {pool}, {options.metric}")


if __name__ == "__main__":
    main()
