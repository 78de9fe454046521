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
from functools import cache
from pathlib import Path

import torch

from selector import spectra
from selector.spectra.linalg import root_eigenvalues
from selector.spectra.threads import over_batch, side_by_side

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
}
ATTENTION = ("q", "k", "v", "o")


def milliseconds(
    work: Callable[[], object],
    repeats: int = 5,
    timer: Callable[[], float] = time.perf_counter,
) -> float:
    """Median time of some work, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = timer()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (timer() - start))
    return statistics.median(times[1:])


@cache
def copy_rate() -> float:
    """Bytes per second of a copy on this GPU, read plus written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source)))


def solver(size: int, batch: int, dtype: torch.dtype) -> dict:
    """Rows a and b: roots of the eigenvalues of a batch of random positive definite matrices."""
    x = torch.randn(batch, size, size, device="cuda")
    matrices = torch.empty(batch, size, size, device="cuda", dtype=dtype)
    for part, out in zip(x.split(64), matrices.split(64), strict=True):
        out.copy_(part.double() @ part.double().mT / size)
    ms = milliseconds(lambda: root_eigenvalues(matrices), 5) / batch
    roots = root_eigenvalues(matrices)
    error = (roots[-1] - torch.linalg.eigvalsh(matrices[-1].double()).flip(-1).clamp_min(0).sqrt()).abs().max()
    frobenius = torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64)
    drift = (roots.double().pow(4).sum(-1).sqrt() / frobenius - 1).abs().max()
    floor = 1e3 * size**3 / 6 * matrices.element_size() / copy_rate()
    return {"value": ms, "unit": "ms per matrix", "size": size, "batch": batch, "dtype": str(dtype), "worst_error": error.item(), "frobenius_drift": drift.item(),
            "bytes": size**3 // 6 * matrices.element_size(), "copy_rate": copy_rate(), "floor": floor, "gap": ms / floor}  # fmt: skip


def model_of(shape: str) -> torch.nn.Module:
    """A random bfloat16 model of 28 layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        num_hidden_layers=28, vocab_size=152064, max_position_embeddings=8192, use_cache=False, **SHAPES[shape]
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def mean_token_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Sum over samples of the mean cross-entropy of their tokens."""
    logits = model(input_ids=ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.float().view(len(ids), -1).mean(1).sum()


def scoring(shape: str, samples: int, tokens: int, projections: tuple[str, ...], precisions: tuple[str, ...]) -> dict:
    """Rows c to f: a scoring pass over a training pass of the same batch."""
    from selector.gradients.capture import GradientCapture, gradients_of_activations_only
    from selector.gradients.targets import find_targets

    model = model_of(shape)
    ids = torch.randint(0, model.config.vocab_size, (samples, tokens), device="cuda")

    def train() -> None:
        mean_token_loss(model, ids).backward()
        model.zero_grad(set_to_none=True)

    def score(precision: str | None) -> None:
        cores: list[spectra.Core] = []
        targets = find_targets(model, projections)

        def reduce(factors) -> None:
            if precision:
                cores.extend(spectra.reduce_factors(factors.x, factors.deltas, precision))

        with gradients_of_activations_only(model), GradientCapture(model, targets, reduce) as capture:
            capture.begin(samples=samples)
            mean_token_loss(model, ids).backward()
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


def dense_svd(full_matrices: bool, dtype: torch.dtype) -> dict:
    """Rows g and h: one sample's training pass and a dense SVD of each of q, k, v, o of 28 layers.

    The pass is timed whole; of the SVDs one of each shape, times the number of such matrices. The gradients have the rank of 511 tokens.
    """
    model = model_of("7B").to(dtype)
    ids = torch.randint(0, model.config.vocab_size, (1, 512), device="cuda")

    def train() -> None:
        mean_token_loss(model, ids).backward()
        model.zero_grad(set_to_none=True)

    training = milliseconds(train, 3)
    del model
    svd = {}
    for rows in (3584, 512):
        gradient = torch.randn(rows, 511, device="cuda") @ torch.randn(511, 3584, device="cuda")
        svd[rows] = milliseconds(lambda g=gradient: torch.linalg.svd(g, full_matrices=full_matrices), 1)
    whole = training + 28 * 2 * (svd[3584] + svd[512])
    return {
        "sample_ms": whole,
        "training_ms": training,
        "svd_ms": svd,
        "unit": "x per sample of row c",
        "extrapolated": "SVDs of 112 matrices from one of each shape",
    }


def made_factors(kind: str, n: int = 2, t: int = 192, i: int = 320, o: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 factors whose gradient has a given spectrum."""
    generator = torch.Generator().manual_seed(0)
    mix, left, right = (
        torch.linalg.qr(torch.randn(n, t, d, generator=generator, dtype=torch.float64).mT).Q.mT for d in (t, o, i)
    )
    k = torch.arange(1, t + 1, dtype=torch.float64)
    sigma = {
        "power 0.5": k**-0.5, "power 1": 1 / k, "power 2": k**-2.0, "clustered": 1 + 1e-4 * (k % 7) + (k > t / 2) * -0.9,
        "repeated": torch.ones_like(k), "rank deficient": (k <= 20).double(), "zero": 0 * k,
    }.get(kind, 1 / k)  # fmt: skip
    delta = mix.mT @ (sigma[:, None] * left)
    x = mix.mT @ right
    if kind == "tokens repeated":
        x = x[:, torch.arange(t) % (t // 2)]
    scale = {"tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    return (x * scale).float(), (delta * scale).float()


MADE = (
    "power 0.5",
    "power 1",
    "power 2",
    "clustered",
    "repeated",
    "rank deficient",
    "tokens repeated",
    "zero",
    "tiny",
    "huge",
)


def relative(sigma: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Relative errors [N, 2] of nuclear norm and effective rank; of a zero spectrum 0 when it is found to be zero, else infinite."""
    errors = []
    for measure in (spectra.nuclear_norm, spectra.effective_rank):
        got, wanted = measure(sigma.cpu()), measure(oracle.cpu())
        none = wanted.isnan() | (wanted == 0)
        same = got.isnan() | (got == 0)
        errors.append(torch.where(none, torch.where(same, 0.0, torch.inf), ((got - wanted) / wanted).abs()))
    return torch.stack(errors, 1)


def dense(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The oracle: float64 SVD of the formed gradient, on the CPU."""
    gradient = (delta.double().mT @ x.double()).cpu()
    return over_batch(torch.linalg.svdvals, gradient)[:, : min(x.shape[1], *gradient.shape[1:])]


def accuracy(folder: Path, texts: Path) -> dict:
    """Rows i and j: errors on made factors, on those of a real model, and what bfloat16 arithmetic of the model changes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selector.gradients.capture import GradientCapture, gradients_of_activations_only
    from selector.gradients.targets import find_targets

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in texts.read_text().splitlines()][:20]
    found: dict[str, dict[str, list[torch.Tensor]]] = {}
    measured: dict[str, list[torch.Tensor]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        kept = []
        targets = find_targets(model, ("q", "k", "v", "o", "up", "down"))
        with (
            gradients_of_activations_only(model),
            GradientCapture(model, targets, lambda f, kept=kept: kept.extend((f.x, d) for d in f.deltas)) as capture,
        ):
            for row in rows:
                prompt = len(tokenizer(row["prompt"] + "\n").input_ids)
                ids = torch.tensor([tokenizer(row["prompt"] + "\n" + row["completion"]).input_ids[:384]], device=device)
                labels = ids.masked_fill(
                    torch.arange(ids.shape[1], device=device) < min(prompt, ids.shape[1] - 2), -100
                )
                capture.begin(samples=1)
                model(input_ids=ids, labels=labels).loss.backward()
                capture.finish()
        with side_by_side() as pool:
            oracles = list(pool.map(lambda pair: dense(*pair), kept))
        measured[name] = [torch.stack([spectra.nuclear_norm(s), spectra.effective_rank(s)], 1) for s in oracles]
        found[name] = {}
        for precision, every in (("fast", 1), ("high", 1), ("reference", 16)):  # the reference route is slow on a GPU
            solved = spectra.solve([spectra.reduce_factors(x, [delta], precision)[0] for x, delta in kept[::every]])
            found[name][precision] = [
                relative(sigma, oracle) for sigma, oracle in zip(solved, oracles[::every], strict=True)
            ]
    made = {
        kind: {p: relative(spectra.singular_values(x.to(device), delta.to(device), p), dense(x, delta)).amax(0).tolist() for p in ("fast", "high", "reference")}
        for kind in MADE for x, delta in [made_factors(kind)]
    }  # fmt: skip
    real = {
        f"{name}, {precision}": {"worst": torch.cat(errors).amax(0).tolist(), "mean": torch.cat(errors).mean(0).tolist()}
        for name, by_precision in found.items() for precision, errors in by_precision.items()
    }  # fmt: skip
    shift = (torch.cat(measured["bfloat16"]) / torch.cat(measured["float32"]) - 1).abs()
    return {
        "value": real["float32, fast"]["worst"][0], "unit": "relative error of nuclear norm, effective rank", "pairs": len(measured["float32"]),
        "real": real, "made": made, "j": {"mean": shift.mean(0).tolist(), "worst": shift.amax(0).tolist()},
    }  # fmt: skip


def on_cpu() -> dict:
    """Row k: 256 tokens at width 1536, over `torch.linalg.svdvals` of the gradient, which has rank 256.

    By the clock with two threads, and by the processor's time with one, which other work on the machine disturbs less.
    """
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(1, 256, 1536, generator=generator) for _ in range(2))
    works = {
        "svdvals": lambda: torch.linalg.svdvals(delta[0].T @ x[0]),
        "fast": lambda: spectra.singular_values(x, delta, "fast"),
        "high": lambda: spectra.singular_values(x, delta, "high"),
    }
    torch.set_num_threads(2)
    clock = {name: milliseconds(work) for name, work in works.items()}
    torch.set_num_threads(1)
    processor = {name: milliseconds(work, timer=time.process_time) for name, work in works.items()}
    return {
        "value": processor["svdvals"] / processor["fast"], "unit": "x svdvals of the gradient, processor time of one thread",
        "high": processor["svdvals"] / processor["high"],
        "by_clock_fast": clock["svdvals"] / clock["fast"], "by_clock_high": clock["svdvals"] / clock["high"],
        "clock_ms": clock, "processor_ms": processor,
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
    "g": lambda: dense_svd(True, torch.float32),
    "h": lambda: dense_svd(False, torch.bfloat16),
    "f.8192": lambda: scoring("7B", 1, 8192, ATTENTION, ("fast",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="all that the machine can run when left out")
    parser.add_argument("--model", type=Path, help="folder of a small model, for rows i and j")
    parser.add_argument("--texts", type=Path, help="JSON lines with prompt and completion, for rows i and j")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, 2 threads"
    path = arguments.out / f"spectra_{re.sub(r'[^A-Za-z0-9]+', '-', hardware)}_{datetime.date.today()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    available = {**(ROWS if cuda else {"k": on_cpu})}
    if arguments.model and arguments.texts:
        available["i"] = lambda: accuracy(arguments.model, arguments.texts)
    for name in arguments.rows or available:
        rows[name] = available[name]()
        if name in ("g", "h") and "c" in rows:
            rows[name]["value"] = rows[name]["sample_ms"] / (rows["c"]["fast_ms"] / rows["c"]["samples"])
        if name == "i":
            rows["j"] = {
                "value": rows["i"]["j"]["mean"][0],
                "unit": "relative shift of nuclear norm, effective rank",
                **rows["i"].pop("j"),
            }
        print(name, json.dumps(rows[name]), flush=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        path.write_text(
            json.dumps({"rows": dict(sorted(rows.items())), "hardware": hardware, "versions": versions}, indent=1)
            + "\n"
        )
        path.with_suffix(".md").write_text(table(rows, hardware))
        if cuda:
            torch.cuda.empty_cache()


def table(rows: dict[str, dict], hardware: str) -> str:
    """The results as Markdown, with a roofline line."""
    lines = [f"# Gradient spectra on {hardware}", "", "| row | value | unit | details |", "|---|---|---|---|"]
    for name, row in sorted(rows.items()):
        details = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                            if key not in ("value", "unit", "real", "made"))  # fmt: skip
        lines.append(f"| {name} | {row.get('value', float('nan')):.4g} | {row['unit']} | {details} |")
    if "a" in rows:
        lines += ["", f"Roofline of row a: {rows['a']['bytes'] / 1e6:.0f} MB per matrix (half the trailing matrix once per column), floor {rows['a']['floor']:.4f} ms "
                      f"at {rows['a']['copy_rate'] / 1e12:.2f} TB/s, gap {rows['a']['gap']:.2f}."]  # fmt: skip
    for title in ("real", "made"):
        if "i" in rows:
            lines += ["", f"Relative errors of nuclear norm and effective rank, {title} factors:", ""]
            lines += [f"- {key}: {json.dumps(value)}" for key, value in rows["i"][title].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
