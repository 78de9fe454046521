"""Checkers for parts that strangers add: each runs a part through the promises of its contract.

from selector.testing import check_policy, check_scorer
check_policy("mine", minimum=0.5)
check_scorer("mine")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from selector.errors import SelectorError
from selector.policies import Budget, Pool, run_policy
from selector.types import Picks, Scores

if TYPE_CHECKING:
    from torch import nn


class ContractError(SelectorError):
    """A part breaks a promise of its contract."""


def make_pool(n: int, *, seed: int = 0, ties: bool = False, missing: float = 0.0) -> Scores:
    """A made-up pool: three sources, lengths over two orders of magnitude, ids that are not in order.

    Args:
        n: number of samples.
        seed: what to draw them from.
        ties: whether only three different scores occur.
        missing: share of samples without a score.
    """
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, n).astype(float) if ties else rng.normal(size=n)
    values[rng.random(n) < missing] = np.nan
    n_tokens = np.exp(rng.uniform(np.log(8), np.log(800), n)).astype(np.int64)
    return Scores(
        ids=np.array([f"sample-{i:05d}" for i in rng.permutation(n)], dtype=object),
        rows=np.arange(n),
        values=values,
        raw=np.exp(values),
        n_tokens=n_tokens,
        n_loss_tokens=np.maximum(n_tokens // 2, 1),
        source=np.array(["code", "math", "chat"], dtype=object)[rng.integers(0, 3, n)],
    )


def shuffled(scores: Scores, order: np.ndarray) -> Scores:
    """The same samples in another order.

    Args:
        scores: a pool.
        order: [N] a permutation of its positions.
    """
    names = ("ids", "rows", "values", "raw", "n_tokens", "n_loss_tokens", "source")
    return Scores(**{name: getattr(scores, name)[order] for name in names})


def check_policy(
    name: str, *, attach: Callable[[Pool, np.ndarray], Pool] | None = None, exact: bool = True, **options: Any
) -> None:
    """Check that a registered policy keeps its contract.

    It must be deterministic under a seed, not depend on the order of the samples, keep within every budget (and fill
    it, when `exact`), never pick a sample without a score, never pick one twice, give a reason for each pick, and bear
    ties, pools of one and empty pools.

    Args:
        name: the policy's registered name.
        attach: adds vectors, neighbours or a target to a pool, computed from its ids alone.
        exact: whether the policy fills a budget as far as it goes; False for filters, which may pick less.
        options: options of the policy.

    Raises:
        SelectorError: the first promise that is broken, as a `ContractError` unless the policy could not even be run.
    """
    budgets = [Budget.parse(text) for text in ("0", "1", "17", "10%", "100%", "5k tokens", "20% tokens", "3 tokens")]
    pools = [
        make_pool(0),
        make_pool(1),
        make_pool(2),
        make_pool(150),
        make_pool(150, ties=True),
        make_pool(150, missing=0.3),
        make_pool(5, missing=1.0),
    ]
    for scores in pools:
        for budget in budgets:
            case = f"policy {name!r}, {len(scores)} samples, {budget}"

            def run(pool: Scores, budget: Budget = budget) -> Picks:
                return run_policy(name, pool, budget, seed=3, attach=attach, **options)

            picks = run(scores)
            _check_picks(case, scores, budget, picks, exact=exact)
            told = _told(scores, picks)
            _promise(told == _told(scores, run(scores)), f"{case}: two runs with one seed differ")
            other = shuffled(scores, np.random.default_rng(1).permutation(len(scores)))
            _promise(told == _told(other, run(other)), f"{case}: the picks depend on the order of the samples")


def check_layer_type(module: nn.Module, parameter: str = "weight") -> None:
    """Check that the registered type of a layer gives its weight gradients.

    The number of inputs and outputs must be right, and the product of the factors of each sample must be what autograd
    computes for the sample alone, whichever way round the layer stores its weight.

    Args:
        module: a layer in float32 whose parameter autograd can differentiate.
        parameter: name of the parameter whose gradient is meant.

    Raises:
        ContractError: the first promise that is broken.
    """
    import torch  # policies are checked without it

    from selector.gradients.layers import layer_type_of

    case, kind = type(module).__name__, layer_type_of(module)
    if kind is None:
        raise ContractError(
            f"{case}: no registered layer type", fix='register it: layer_types.register("' + case + '")(...)'
        )
    inputs, outputs = kind.size(module)
    weight = module.get_parameter(parameter)
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 7):
        x = torch.randn(2, tokens, inputs, generator=generator)
        y = module(x)
        _promise(
            y.shape == (2, tokens, outputs), f"{case}: {inputs} inputs give {list(y.shape)}, not {outputs} outputs"
        )
        delta = torch.randn(y.shape, generator=generator)
        found_x, found_delta = kind.factors(module, x, delta) if kind.factors else (x, delta)
        for sample in range(2):
            (expected,) = torch.autograd.grad(y[sample], weight, delta[sample], retain_graph=True)
            found = found_delta[sample].mT @ found_x[sample]
            near = [
                torch.allclose(found, side, rtol=1e-4, atol=1e-5)
                for side in (expected, expected.mT)
                if side.shape == found.shape
            ]
            _promise(any(near), f"{case}: the factors of {tokens} tokens do not give the gradient of {parameter}")


def check_scorer(name: str) -> None:
    """Check that a registered scorer keeps its contract.

    It must give one floating-point number per sample, leave the pass as it was, and depend neither on batch mates, padding
    and the token that fills it, nor on the order of the samples or on joining them without padding; also where samples have
    several sequences, or a single response token.

    Args:
        name: the scorer's registered name.

    Raises:
        ContractError: the first promise that is broken.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from selector.batching import Batch, collate, join
    from selector.data.samples import Sample, TokenSequence
    from selector.forward import ForwardScores, scorers

    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, vocab_size=50
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double().eval()
    run = ForwardScores(model, {name: scorers[name]}, bos_token_id=1)
    rng = np.random.default_rng(0)

    def sequence(prompt: int, response: int, first: int) -> TokenSequence:
        ids = rng.integers(3, 50, prompt + response).astype(np.int32)
        ids[0] = first
        return TokenSequence(ids, np.arange(prompt + response) >= prompt)

    def logits(batch: Batch) -> tuple[torch.Tensor, None]:
        return model(**batch.inputs, use_cache=False).logits, None

    def values(batch: Batch) -> dict[str, float]:
        given, _ = logits(batch)
        before = given.clone()
        found = run(batch, given, None, logits)[name]
        _promise(found.shape == (len(batch.samples),), f"{case}: {list(found.shape)} numbers for {len(batch.samples)}")
        _promise(torch.equal(given, before), f"{case}: the logits were changed")
        return dict(zip([s.sample_id for s in batch.samples], found.tolist(), strict=True))

    shapes = {1: [(3, 1), (5, 9), (1, 30), (40, 20)], 2: [(4, 6), (2, 13), (9, 60)]}
    for several, lengths in shapes.items():
        case = f"scorer {name!r}, {several} sequences each"
        samples = [
            Sample(f"{i}", i, None, tuple(sequence(*size, first=1 + (i + k) % 2) for k in range(several)))
            for i, size in enumerate(lengths)
        ]
        with torch.no_grad(), run.attached():
            alone = {key: value for sample in samples for key, value in values(collate([sample], 0)).items()}
            batches = {
                "batch mates or padding": collate(samples, 0),
                "the token that fills the padding": collate(samples, 7),
                "the order of the samples": collate(samples[::-1], 0),
                "joining samples without padding": join(samples),
            }
            for what, batch in batches.items():
                for key, value in values(batch).items():
                    same = np.isclose(value, alone[key], rtol=1e-7, atol=1e-12, equal_nan=True)
                    _promise(bool(same), f"{case}: the score depends on {what}: {alone[key]} alone, {value} together")


def _told(scores: Scores, picks: Picks) -> tuple[list[Any], ...]:
    """All that picks say, by sample id."""
    weights = np.ones(len(picks.positions)) if picks.weights is None else picks.weights
    return scores.ids[picks.positions].tolist(), picks.reasons.tolist(), weights.tolist()


def _check_picks(case: str, scores: Scores, budget: Budget, picks: Picks, *, exact: bool) -> None:
    at = picks.positions
    scored = np.isfinite(scores.values)
    _promise(at.ndim == 1 and at.dtype.kind == "i", f"{case}: positions are not one row of integers")
    _promise(len(np.unique(at)) == len(at), f"{case}: a sample is picked twice")
    _promise(bool(scored[at].all()), f"{case}: a sample without a score is picked")
    _promise(
        len(picks.reasons) == len(at) and all(isinstance(r, str) and r for r in picks.reasons),
        f"{case}: not every pick has a reason",
    )
    if picks.weights is not None:
        sound = len(picks.weights) == len(at) and bool((np.isfinite(picks.weights) & (picks.weights > 0)).all())
        _promise(sound, f"{case}: weights are not finite and positive, one for each pick")
    limit = int(budget.resolve(scores.n_tokens[scored]).amount)
    spent = int(scores.n_tokens[at].sum()) if budget.unit == "tokens" else len(at)
    _promise(spent <= limit, f"{case}: {spent} {budget.unit} exceed the budget of {limit}")
    if exact and len(at) < scored.sum():
        slack = int(scores.n_tokens[scored].max()) if budget.unit == "tokens" else 1
        _promise(spent > limit - slack, f"{case}: {spent} {budget.unit} leave room in the budget of {limit}")


def _promise(kept: bool, broken: str) -> None:
    if not kept:
        raise ContractError(broken)
