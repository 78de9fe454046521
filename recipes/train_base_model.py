"""Train a small base model from a text file: tokenizer, Llama-architecture model, checkpoint in Hugging Face format.

    python recipes/train_base_model.py --corpus corpus.txt.xz --out tiny/ --seconds 1200

The embedded model of 3.2 M parameters was made this way from 157 MB of openly licensed text: 0.9 billion tokens, about
three minutes on one H200 in bfloat16. On two CPU cores an hour gives a model that completes words. With `--tokens` the
tokenizer and the tokens of the corpus are kept, and a second model of the same vocabulary begins to train at once.

Documents of the corpus are separated by the byte 0x1E (record separator), or by empty lines where there is none. The last
documents, 1 % of the text, are held out; the checkpoint's `training.json` records the loss on them.
"""

from __future__ import annotations

import json
import lzma
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a small base model from a text file."""

    corpus: Path
    """Text file, plain or .xz."""
    out: Path
    """Directory of the checkpoint."""
    tokens: Path | None = None
    """Folder that keeps tokenizer and tokens for the next run on the same corpus; made when it is missing."""
    vocabulary: int = 4096
    """Tokens of the byte-level BPE."""
    hidden: int = 192
    """Width of the model."""
    layers: int = 6
    """Decoder layers."""
    heads: int = 6
    """Query heads."""
    kv_heads: int = 3
    """Key and value heads."""
    intermediate: int = 512
    """Width of the MLP."""
    length: int = 512
    """Tokens of a training sequence."""
    batch: int = 128
    """Sequences of a step."""
    learning_rate: float = 3e-3
    """Peak of the schedule: 2 % warm-up, then cosine to a tenth."""
    seconds: float = 190
    """Training time; the schedule follows the clock, so any machine gives a finished run."""
    seed: int = 0
    """Of weights and batches."""


def documents(corpus: Path) -> list[str]:
    """Documents of a text file."""
    raw = lzma.decompress(corpus.read_bytes()) if corpus.suffix == ".xz" else corpus.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    return [part for part in text.split("\x1e" if "\x1e" in text else "\n\n") if part.strip()]


def train_tokenizer(texts: list[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[0], pad_token=SPECIAL[3],
        additional_special_tokens=list(SPECIAL[1:3]), model_max_length=8 * length, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All documents one behind the other, each ended by the end token, in the smallest integers that hold the vocabulary."""
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    tokens: list[np.ndarray] = [np.zeros(0, kind)]
    for start in tqdm(range(0, len(texts), 4000), "tokenizing"):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 4000], add_special_tokens=False)
        tokens += [np.array([*one.ids, tokenizer.eos_token_id], dtype=kind) for one in encoded]
    return np.concatenate(tokens)


def prepare(settings: Settings) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Tokenizer, tokens to train on and held-out tokens: kept ones, or made from the corpus."""
    folder = settings.tokens
    of = {"corpus": settings.corpus.name, "bytes": settings.corpus.stat().st_size, "vocabulary": settings.vocabulary}
    if folder is not None and (folder / "made_of.json").exists():
        made_of = json.loads((folder / "made_of.json").read_text())
        if made_of != of:
            raise SystemExit(f"{folder} holds tokens of {made_of}, wanted {of}: name another folder with --tokens")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, model_max_length=8 * settings.length)
        return tokenizer, np.load(folder / "train.npy"), np.load(folder / "held_out.npy")
    texts = documents(settings.corpus)
    held_out = max(len(texts) // 100, 1)
    training = texts[:-held_out] or texts
    tokenizer = train_tokenizer(training, settings.vocabulary, settings.length)
    train, rest = encode(training, tokenizer), encode(texts[-held_out:], tokenizer)
    if folder is not None:
        tokenizer.save_pretrained(folder)
        np.save(folder / "train.npy", train)
        np.save(folder / "held_out.npy", rest)
        (folder / "made_of.json").write_text(json.dumps(of))  # last: a folder without it is begun anew
    return tokenizer, train, rest


def pack(tokens: np.ndarray, length: int) -> np.ndarray:
    """Tokens as rows of `length` + 1; what is left over at the end is dropped."""
    return tokens[: len(tokens) // (length + 1) * (length + 1)].reshape(-1, length + 1)


def batches(rows: np.ndarray, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches, every row once per pass."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, max(len(order) - size + 1, 1), size):
            yield torch.from_numpy(rows[order[start : start + size]].astype(np.int64))


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, nats."""
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=rows.is_cuda):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, *tokens = prepare(settings)
    rows, validation = (pack(part, settings.length) for part in tokens)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads, intermediate_size=settings.intermediate, max_position_embeddings=8 * settings.length,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    started, steps = time.monotonic(), 0
    with tqdm(total=int(settings.seconds), desc="training", unit="s") as progress:
        for rows_of_step in batches(rows, settings.batch, settings.seed):
            elapsed = (time.monotonic() - started) / settings.seconds
            if elapsed >= 1:
                break
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * elapsed))
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min(cosine, (steps + 1) / 100)
            loss = loss_of(model, rows_of_step.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if steps % 20 == 0:
                progress.set_postfix(steps=steps, loss=f"{loss.item():.3f}", refresh=False)
            progress.update(int(elapsed * settings.seconds) - progress.n)
    with torch.no_grad():
        parts = torch.from_numpy(validation[:256].astype(np.int64)).to(device).split(16)
        validation_loss = float(np.mean([loss_of(model, part).item() for part in parts])) if len(validation) else None
    model.to(torch.bfloat16).save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    record = {"validation_loss": validation_loss, "steps": steps, "tokens": steps * settings.batch * settings.length}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    (settings.out / "training.json").write_text(json.dumps(record | {"settings": values}, indent=1))
    print(f"{settings.out}: {steps} steps, held-out loss {validation_loss} nats per token")


if __name__ == "__main__":
    main(tyro.cli(Settings))
