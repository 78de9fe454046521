"""The price and the accuracy of gradient spectra: `python benchmarks/spectra.py [rows] [--model DIR --texts JSONL]`.

Rows (all that the machine can run, by default):

    a b   eigenvalues of batches of symmetric matrices, ms per matrix
    c d e f   the whole scoring pass of a random model, over a training forward and backward of the same batch
    g h   the same against dense SVDs of weight gradients, one sample at a time
    i j   accuracy against dense float64 SVD, on made and on real factors; bfloat16 model against float32 model
    k     CPU: over `torch.linalg.svdvals` of the gradient

Each time is the median of five runs after warm-up, by device events on a GPU. Results go to
`benchmarks/results/spectra_<hardware>_<date>.json` and `.md`; rows that were not run are taken over from an earlier file of that name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from selector import spectra
from selector.spectra.linalg import root_eigenvalues

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2),
}
ATTENTION = ("q", "k", "v", "o")
HBM = 4.25e12
"""Bytes per second of a device-to-device copy on one H200, read and written."""


def milliseconds(work: Callable[[], object], repeats: int = 5, prepare: Callable[[], object] = lambda: None) -> float:
    """Median time of some work, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        prepare()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def solver(size: int, batch: int, dtype: torch.dtype) -> dict:
    """Rows a and b: roots of the eigenvalues of a batch of random positive definite matrices."""
    x = torch.randn(batch, size, size, device="cuda")
    matrices = torch.empty(batch, size, size, device="cuda", dtype=dtype)
    for part, out in zip(x.split(64), matrices.split(64), strict=True):
        out.copy_(part.double() @ part.double().mT / size)
    work = matrices.clone()
    ms = milliseconds(lambda: root_eigenvalues(work), 5, lambda: work.copy_(matrices)) / batch
    error = (root_eigenvalues(matrices[:1].clone()) - torch.linalg.eigvalsh(matrices[0].double()).flip(-1).sqrt()).abs().max()
    floor = 1e3 * size**3 / 6 * matrices.element_size() / HBM
    return {"value": ms, "unit": "ms per matrix", "size": size, "batch": batch, "dtype": str(dtype), "worst_error": error.item(),
            "bytes": size**3 // 6 * matrices.element_size(), "floor": floor, "gap": ms / floor}  # fmt: skip


def scoring(shape: str, samples: int, tokens: int, projections: tuple[str, ...], precisions: tuple[str, ...]) -> dict:
    """Rows c to f: a scoring pass over a training pass of the same batch."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from selector.gradients.capture import GradientCapture, gradients_of_activations_only
    from selector.gradients.targets import find_targets

    config = Qwen2Config(num_hidden_layers=28, vocab_size=152064, max_position_embeddings=8192, use_cache=False, **SHAPES[shape])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, config.vocab_size, (samples, tokens), device="cuda")

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.float().view(samples, -1).mean(1).sum()

    def train() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)

    def score(precision: str | None) -> None:
        cores: list[spectra.Core] = []
        targets = find_targets(model, projections)

        def reduce(factors) -> None:
            if precision:
                cores.extend(spectra.reduce_factors(factors.x, factors.deltas, precision))

        with gradients_of_activations_only(model), GradientCapture(model, targets, reduce) as capture:
            capture.begin(samples=samples)
            loss().backward()
            capture.finish()
        if cores:
            sigma = spectra.solve(cores)
            torch.stack([spectra.effective_rank(s) for s in sigma] + [spectra.nuclear_norm(s) for s in sigma]).cpu()

    training = milliseconds(train)
    passes = {name: milliseconds(lambda name=name: score(name)) for name in precisions}
    plain = milliseconds(lambda: score(None), 3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    score(precisions[0])
    return {
        "value": passes[precisions[0]] / training, "unit": "x training pass", "shape": shape, "samples": samples, "tokens": tokens,
        "training_ms": training, "hooks_only_ms": plain, **{f"{name}_ms": ms for name, ms in passes.items()},
        **{name: ms / training for name, ms in passes.items()}, "peak_GB": (torch.cuda.max_memory_allocated() - before) / 1e9,
    }  # fmt: skip


ROWS: dict[str, Callable[[], dict]] = {
    "a": lambda: solver(512, 1792, torch.float32),
    "a.high": lambda: solver(512, 1792, torch.float64),
    "b.256": lambda: solver(256, 1792, torch.float32),
    "b.1024": lambda: solver(1024, 128, torch.float32),
    "b.2048": lambda: solver(2048, 56, torch.float32),
    "b.3584": lambda: solver(3584, 16, torch.float32),
    "c": lambda: scoring("7B", 16, 512, ATTENTION, ("fast", "auto", "high")),
    "d": lambda: scoring("7B", 16, 512, (), ("fast",)),
    "e": lambda: scoring("1.5B", 16, 512, ATTENTION, ("fast", "high")),
    "f": lambda: scoring("7B", 2, 4096, ATTENTION, ("fast",)),
    "f.8192": lambda: scoring("7B", 1, 8192, ATTENTION, ("fast",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()} x{torch.get_num_threads()}"
    stem = f"spectra_{re.sub(r'[^A-Za-z0-9]+', '-', hardware)}_{datetime.date.today()}"
    path = arguments.out / f"{stem}.json"
    rows = json.loads(path.read_text()).get("rows", {}) if path.exists() else {}
    for name in arguments.rows:
        try:
            rows[name] = ROWS[name]()
        except torch.cuda.OutOfMemoryError as error:
            print(name, error)
            continue
        print(name, json.dumps(rows[name]), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        path.write_text(json.dumps(rows))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps({"rows": rows, "hardware": hardware, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
