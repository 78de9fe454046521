"""Models of random weights, data of Alpaca's lengths and epochs of training, for the benchmark of scoring."""

from __future__ import annotations

import gc
import time

import datasets
import numpy as np
import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from selector import ScoreConfig
from selector.assets import TINY_MODEL
from selector.batching import collate, token_budget_batches
from selector.data.layout import recognize
from selector.data.load import load_rows
from selector.data.samples import Encoder, Sample

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
VOCABULARY = {"tiny": 4096}
PROMPT, COMPLETION, MOST = (17, 0.46), (54, 1.28), 1000
LARGEST_BATCH = 16_384
"""Tokens of a batch that training tries first."""
ROOM_FOR_TRAINING = 0.6
"""Share of the memory that weights, their gradients and AdamW's two moments may take for training to be timed."""


def build_model(shape: str, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> Qwen2ForCausalLM:
    """A model of random weights, the same on every process."""
    settings = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = Qwen2Config(
        **settings,
        vocab_size=VOCABULARY.get(shape, 151_936),
        max_position_embeddings=65_536,
        tie_word_embeddings=shape != "7b",
        dtype=dtype,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def build_data(count: int, data: str | None) -> datasets.Dataset:
    """Rows of a file, or texts of random tokens with the lengths of Alpaca."""
    if data is not None:
        rows = load_rows(data)
        return rows.select(range(min(count, len(rows)))).select_columns(["prompt", "completion"])
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    rng = np.random.default_rng(0)
    # words that the tokenizer knows as one token each, so that a text of n words has about n tokens
    words = np.array(
        [
            word
            for token in range(300, 2000)
            if (word := tokenizer.decode([token])).startswith(" ") and word.strip().isalpha()
        ]
    )

    def texts(median: float, deviation: float) -> list[str]:
        lengths = np.clip(rng.lognormal(np.log(median), deviation, count), 1, MOST).astype(int)
        return ["".join(rng.choice(words, length)) for length in lengths]

    return datasets.Dataset.from_dict({"prompt": texts(*PROMPT), "completion": texts(*COMPLETION)})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shard(model: Qwen2ForCausalLM, state: PartialState) -> None:
    """FSDP2 over all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    device: torch.device,
) -> dict:
    """Time of an epoch of full fine-tuning in batches of like length: little padding, which favors training.

    The first epoch of a process meets each batch's shape for the first time, for which libraries make plans; later ones do not.
    """
    rows = recognize(data.column_names, ScoreConfig()).rows(data)
    samples = list(
        Encoder(tokenizer, 4096, "skip").encode(rows, [str(i) for i in range(len(data))], [None] * len(data))
    )
    model.train().requires_grad_(True)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
    fits = 4 * weights <= ROOM_FOR_TRAINING * room
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")

    def step(batch: list[Sample], update: bool) -> None:
        made = collate(batch, 0, device)
        labels = made.input_ids.masked_fill(~made.loss_mask, -100)
        model(
            input_ids=made.input_ids, attention_mask=made.attention_mask, labels=labels, use_cache=False
        ).loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def epoch(batches: list[list[Sample]], update: bool) -> float:
        synchronize(device)
        started = time.perf_counter()
        for batch in batches:
            step(batch, update)
        synchronize(device)
        return time.perf_counter() - started

    tokens_per_batch = LARGEST_BATCH
    while True:
        batches = token_budget_batches([s for s in samples if s.status == "ok"], tokens_per_batch)
        try:
            for batch in (batches[0], batches[-1]):  # the widest, and the one with the most samples
                step(batch, fits)
            report = {"tokens per batch": tokens_per_batch, "batches": len(batches)}
            passes = "training" if fits else "forward and backward"
            return report | {f"seconds {passes}, {which} epoch": epoch(batches, fits) for which in ("first", "later")}
        except torch.OutOfMemoryError:
            # in small steps: training shall have the largest batches that fit
            tokens_per_batch = tokens_per_batch * 9 // 10
        optimizer.zero_grad(set_to_none=True)
        free()


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
