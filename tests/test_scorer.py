"""The scorer against one-sample autograd, and what a sample's features must not depend on."""

from __future__ import annotations

import copy

import datasets
import numpy as np
import pytest
import torch
from oracles import autograd_gradients, dense_measures

from selector.batching import collate
from selector.config import ScoreConfig
from selector.data.samples import Encoder, Sample, TokenSequence
from selector.errors import DataError, ModelError, SelectorError, StoreError
from selector.gradients.targets import find_targets
from selector.scorer import score_dataset
from selector.scorer.features import FeatureExtractor
from selector.types import MEASURES

TOLERANCE = 1e-5
"""Largest relative shift of a float32 feature that batch mates, padding or order may cause."""


@pytest.fixture
def samples(tokenizer, pool) -> list[Sample]:
    rows = [pool[i] for i in range(6)]
    parts = [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows]
    return list(Encoder(tokenizer, 512, "error").encode(parts, [r["id"] for r in rows], [None] * len(rows)))


def features_of(model, samples, *, precision="high", pad=3) -> dict[str, dict[str, np.ndarray]]:
    """Features by sample id and measure, of all samples in one batch."""
    extractor = FeatureExtractor(model, find_targets(model), precision)
    with extractor.attached():
        return {row["sample_id"]: row for row in extractor(collate(samples, pad))}


def worst_difference(first, second) -> float:
    """Largest relative difference of any feature of the samples that both hold."""
    return max(
        float(np.nanmax(np.abs(first[i][name] - second[i][name]) / np.abs(second[i][name])))
        for i in set(first) & set(second)
        for name in MEASURES
    )


def test_features_equal_dense_svd_of_autograd_gradients(small_llama, samples):
    found = features_of(small_llama, samples)
    targets = find_targets(small_llama)
    for sample in samples[:3]:
        gradients = autograd_gradients(small_llama, sample, [target.spec.name for target in targets])
        for i, target in enumerate(targets):
            for name, expected in dense_measures(gradients[target.spec.name]).items():
                assert found[sample.sample_id][name][i] == pytest.approx(expected, rel=2e-4), (target.spec.key, name)


def test_capture_equals_autograd_gradients_elementwise(small_llama, samples):
    """Factors, not only their spectra: a swapped pair of projections would keep every norm."""
    from selector.gradients.capture import GradientCapture, gradients_of_activations_only
    from selector.gradients.losses import sample_losses

    targets = find_targets(small_llama)
    gradients = {}

    def keep(factors):
        for delta, spec in zip(factors.deltas, factors.specs, strict=True):
            gradients[spec.name] = torch.einsum("nto,nti->noi", delta, factors.x)

    batch = collate(samples[:4], 3)
    capture = GradientCapture(small_llama, targets, keep)
    with gradients_of_activations_only(small_llama), capture:
        capture.begin(samples=len(batch.samples))
        sample_losses(small_llama(batch.input_ids, attention_mask=batch.attention_mask).logits, batch).sum().backward()
        capture.finish()
    for i, sample in enumerate(samples[:4]):
        for name, expected in autograd_gradients(small_llama, sample, list(gradients)).items():
            torch.testing.assert_close(gradients[name][i].double(), expected, rtol=1e-3, atol=1e-6)


def test_projections_of_one_input_are_handed_over_together(small_llama, samples):
    from selector.gradients.capture import GradientCapture, gradients_of_activations_only
    from selector.gradients.losses import sample_losses

    groups = []
    capture = GradientCapture(small_llama, find_targets(small_llama), lambda f: groups.append({s.key for s in f.specs}))
    batch = collate(samples[:2], 3)
    with gradients_of_activations_only(small_llama), capture:
        capture.begin(samples=len(batch.samples))
        sample_losses(small_llama(batch.input_ids, attention_mask=batch.attention_mask).logits, batch).sum().backward()
        capture.finish()
    layer = [{"{}.down"}, {"{}.gate", "{}.up"}, {"{}.o"}, {"{}.q", "{}.k", "{}.v"}]
    assert groups == [{key.format(i) for key in keys} for i in (1, 0) for keys in layer]


def test_batch_size_invariance(small_llama, samples):
    together = features_of(small_llama, samples)
    alone = {}
    for sample in samples:
        alone |= features_of(small_llama, [sample])
    assert worst_difference(together, alone) < TOLERANCE


def test_batch_mates_invariance(small_llama, samples):
    assert (
        worst_difference(features_of(small_llama, samples[:2]), features_of(small_llama, [samples[0], samples[5]]))
        < TOLERANCE
    )


def test_padding_invariance(small_llama, samples):
    """A longer mate adds padding to the sample; the token that fills it is another one as well."""
    longest, shortest = max(samples, key=lambda s: s.n_tokens), min(samples, key=lambda s: s.n_tokens)
    assert longest.n_tokens > 2 * shortest.n_tokens
    padded = features_of(small_llama, [shortest, longest], pad=17)
    assert worst_difference(padded, features_of(small_llama, [shortest])) < TOLERANCE


def test_order_invariance(small_llama, samples):
    assert worst_difference(features_of(small_llama, samples), features_of(small_llama, samples[::-1])) < TOLERANCE


def test_sequences_of_one_sample_add_up(small_llama, samples):
    """Two sequences as one sample give the spectrum of the sum of their gradients, weighted by loss tokens."""
    pair = Sample("pair", 0, None, samples[0].sequences + samples[1].sequences)
    found = features_of(small_llama, [pair])["pair"]
    targets = find_targets(small_llama)
    gradients = autograd_gradients(small_llama, pair, [target.spec.name for target in targets])
    for i, target in enumerate(targets):
        expected = dense_measures(gradients[target.spec.name])["nuclear_norm"]
        assert found["nuclear_norm"][i] == pytest.approx(expected, rel=2e-4)


def test_model_is_left_as_it_was(small_llama, samples):
    small_llama.train()
    small_llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {
        name: (module.training, set(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in small_llama.named_modules()
    }
    required = {name: parameter.requires_grad for name, parameter in small_llama.named_parameters()}
    state = copy.deepcopy(small_llama.state_dict())
    features_of(small_llama, samples[:2])
    after = {
        name: (module.training, set(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in small_llama.named_modules()
    }
    assert after == before
    assert {name: parameter.requires_grad for name, parameter in small_llama.named_parameters()} == required
    assert all(parameter.grad is None for parameter in small_llama.parameters())
    assert all(torch.equal(state[name], value) for name, value in small_llama.state_dict().items())


def test_sample_whose_loss_is_not_finite_gets_a_status_and_spares_its_mates(small_llama, samples):
    """One token's embedding is NaN: only the sample that holds it fails."""
    rare = next(
        t
        for t in samples[0].sequences[0].input_ids.tolist()
        if all(t not in s.sequences[0].input_ids for s in samples[1:])
    )
    sound = features_of(small_llama, samples[1:3])
    with torch.no_grad():
        small_llama.model.embed_tokens.weight[rare] = float("nan")
        # tied or not, the head must stay finite for the others
    rows = features_of(small_llama, samples[:3])
    assert rows[samples[0].sample_id]["status"] == "nonfinite"
    assert rows[samples[0].sample_id]["effective_rank"] is None
    assert rows[samples[0].sample_id]["loss"] is None
    assert [rows[s.sample_id]["status"] for s in samples[1:3]] == ["ok", "ok"]
    assert worst_difference(rows | {samples[0].sample_id: sound[samples[1].sample_id]}, sound) < TOLERANCE


def test_gradient_of_a_single_token_has_rank_one(small_llama):
    """Attention over a single token has no choice: q and k get nothing but rounding."""
    sequence = TokenSequence(np.array([5, 9], dtype=np.int32), np.array([False, True]))
    row = features_of(small_llama, [Sample("two", 0, None, (sequence,))])["two"]
    projections = [target.spec.projection for target in find_targets(small_llama)]
    largest = row["nuclear_norm"].max()
    for projection, rank, norm in zip(projections, row["effective_rank"], row["nuclear_norm"], strict=True):
        if projection in ("q", "k"):
            assert norm < 1e-6 * largest
        else:
            assert rank == pytest.approx(1.0, abs=1e-4)


# whole runs ----------------------------------------------------------------------------------------------------------


def rows_with(pool, **changes) -> datasets.Dataset:
    rows = [dict(pool[i]) for i in range(8)]
    for place, (column, value) in changes.items():
        rows[int(place.removeprefix("row"))][column] = value
    return datasets.Dataset.from_list(rows)


def test_store_holds_every_row_in_order(small_llama, tokenizer, pool, tmp_path):
    data = pool.select(range(12))
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(shard_rows=5, id_column="id"))
    assert store.ids.tolist() == data["id"]
    assert len(store.shard_paths()) == 3
    assert store.verify() == []
    assert np.isfinite(store.features("effective_rank")).all()
    assert store.manifest.cost[0]["samples"] == 12


def test_interrupted_run_is_finished_by_the_same_call(small_llama, tokenizer, pool, tmp_path, monkeypatch):
    data = pool.select(range(12))
    config = ScoreConfig(shard_rows=2, tokens_per_batch=400)
    whole = score_dataset(small_llama, tokenizer, data, tmp_path / "whole", config)
    calls = []
    original = FeatureExtractor.__call__

    def failing(self, batch):
        calls.append(len(batch.samples))
        if len(calls) == 3 + 4:  # the self-test takes three
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(FeatureExtractor, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        score_dataset(small_llama, tokenizer, data, tmp_path / "broken", config)
    done = len(whole.open(tmp_path / "broken"))
    assert 0 < done < 12
    monkeypatch.setattr(FeatureExtractor, "__call__", original)
    measured = []
    monkeypatch.setattr(
        FeatureExtractor, "__call__", lambda self, batch: measured.extend(batch.samples) or original(self, batch)
    )
    finished = score_dataset(small_llama, tokenizer, data, tmp_path / "broken", config)
    assert len(measured[4:]) == 12 - done  # after those of the self-test
    assert finished.verify() == []
    for name in MEASURES:
        np.testing.assert_allclose(finished.features(name), whole.features(name), rtol=TOLERANCE)


def test_larger_limit_adds_rows_to_a_store(small_llama, tokenizer, pool, tmp_path):
    data = pool.select(range(8))
    score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(limit=3))
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(limit=8, tokens_per_batch=100))
    assert len(store) == 8
    assert store.verify() == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"precision": "fast"}, "precision"),
        ({"max_length": 400}, "max_length"),
        ({"projections": ("q",)}, "projections"),
    ],
)
def test_changed_identity_is_refused_with_both_values(small_llama, tokenizer, pool, tmp_path, change, field):
    data = pool.select(range(2))
    score_dataset(small_llama, tokenizer, data, tmp_path / "s")
    with pytest.raises(StoreError, match=f"{field} differs") as caught:
        score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(**change))
    assert "got:" in str(caught.value)
    assert "allowed:" in str(caught.value)


def test_changed_model_tokens_or_rows_are_refused(small_llama, tokenizer, pool, tmp_path):
    data = pool.select(range(2))
    score_dataset(small_llama, tokenizer, data, tmp_path / "s")
    with torch.no_grad():
        small_llama.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(StoreError, match="model differs"):
        score_dataset(small_llama, tokenizer, data, tmp_path / "s")
    with pytest.raises(StoreError, match="data differs"):
        score_dataset(small_llama, tokenizer, pool.select(range(1, 3)), tmp_path / "s")


def test_directory_of_something_else_is_refused_and_left_alone(small_llama, tokenizer, pool, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(StoreError, match="in use by something else"):
        score_dataset(small_llama, tokenizer, pool.select(range(2)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_all_problems_are_reported_at_once_and_nothing_is_written(small_llama, tokenizer, pool, tmp_path):
    data = rows_with(pool, row1=("completion", ""), row2=("id", "gsm8k-train-3120"), row3=("completion", "long " * 600))
    with pytest.raises(SelectorError) as caught:
        score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(id_column="id", layers=(7,)))
    message = str(caught.value)
    for part in (
        "4 problems",
        "no such layer",
        "repeats 1 ids",
        "longer than the maximum",
        "cannot be scored",
        "1 no_loss_tokens",
    ):
        assert part in message
    assert not (tmp_path / "s").exists()


def test_rows_that_cannot_be_scored_get_a_status_when_they_are_few(small_llama, tokenizer, pool, tmp_path):
    data = rows_with(pool, row1=("completion", ""), row3=("completion", "long " * 600))
    config = ScoreConfig(truncation="skip", max_failed=0.5)
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s", config)
    table = store.to_arrow(["status", "loss", "effective_rank"]).to_pylist()
    assert [row["status"] for row in table] == ["ok", "no_loss_tokens", "ok", "too_long", "ok", "ok", "ok", "ok"]
    assert table[1]["loss"] is None
    assert set(table[1]["effective_rank"]) == {None}


def test_equal_rows_keep_apart_ids(small_llama, tokenizer, pool, tmp_path):
    data = pool.select([0, 1, 0])
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s")
    ids = store.ids.tolist()
    assert ids[0].removesuffix("-0") == ids[2].removesuffix("-1")
    np.testing.assert_allclose(store.features("nuclear_norm")[0], store.features("nuclear_norm")[2], rtol=TOLERANCE)


def test_missing_columns_are_named(small_llama, tokenizer, tmp_path):
    data = datasets.Dataset.from_list([{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match="fit no format") as caught:
        score_dataset(small_llama, tokenizer, data, tmp_path / "s")
    assert "--columns prompt=question completion=answer" in str(caught.value)
    with pytest.raises(DataError, match="no column 'questoin'") as caught:
        score_dataset(
            small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(columns=("prompt=questoin", "completion=answer"))
        )
    assert "did you mean 'question'?" in str(caught.value)


def test_model_without_known_layers_lists_its_own(tokenizer, pool, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=len(tokenizer)))
    with pytest.raises(ModelError, match="no projection that is known by name") as caught:
        score_dataset(model, tokenizer, pool.select(range(2)), tmp_path / "s")
    assert "backbone.layers.N.mixer.in_proj" in str(caught.value)
    assert "--layer-names role=pattern" in str(caught.value)


def test_fingerprint_of_a_parameter_too_large_for_float32_positions():
    """2^28 + 1 entries, one value expanded: the last of evenly spaced positions must not lie past the end."""
    from selector.scorer.models import model_fingerprint

    module = torch.nn.Module()
    module.embedding = torch.nn.Parameter(torch.zeros(1).expand(2**28 + 1))
    assert len(model_fingerprint(module)) == 16
