"""Runs of the scorer as a user meets them: growing data, scarce memory, models that would give wrong numbers, and what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import autograd_gradients

from selector.batching import Batch, BatchQueue, collate, deal, join, token_budget_batches
from selector.cli.inspect import time_by_phase
from selector.cli.merge import MergeCommand
from selector.cli.score import show_estimate, summarize
from selector.cli.transfer import TransferCommand
from selector.config import ScoreConfig
from selector.data.samples import Encoder, Sample, TokenSequence
from selector.errors import StoreError
from selector.gradients.losses import sequence_log_probs
from selector.gradients.targets import find_targets
from selector.scorer import estimate_run, score_dataset
from selector.scorer.clocks import Clocks
from selector.scorer.features import FeatureExtractor
from selector.scorer.measure import handed_out, in_step, measure
from selector.scorer.progress import Progress, duration
from selector.scorer.transfer import matched_layers, transfer
from selector.spectra import SketchConfig, sketch
from selector.store import FeatureStore
from selector.store.merge import merge
from selector.types import MEASURES, LayerSpec


def made_up(*lengths: int) -> list[Sample]:
    """Samples of given lengths whose tokens are all the same."""
    sequences = [TokenSequence(np.full(n, 5, dtype=np.int32), np.arange(n) > 0) for n in lengths]
    return [Sample(f"s{row}", row, None, (sequence,)) for row, sequence in enumerate(sequences)]


# data that grows -----------------------------------------------------------------------------------------------------


def test_appended_rows_are_scored_with_leave_and_only_they(small_llama, tokenizer, pool, tmp_path, monkeypatch):
    store = score_dataset(small_llama, tokenizer, pool.select(range(4)), tmp_path / "s")
    old = {path.name: path.read_bytes() for path in store.shard_paths()}
    with pytest.raises(StoreError, match="shorter data set") as caught:
        score_dataset(small_llama, tokenizer, pool.select(range(7)), tmp_path / "s")
    assert "7 rows" in str(caught.value)
    assert "4 rows" in str(caught.value)
    assert "--append" in str(caught.value)
    store = score_dataset(small_llama, tokenizer, pool.select(range(7)), tmp_path / "s", ScoreConfig(append=True))
    assert len(store) == 7
    assert store.verify() == []
    assert old.items() <= {path.name: path.read_bytes() for path in store.shard_paths()}.items()
    whole = score_dataset(small_llama, tokenizer, pool.select(range(7)), tmp_path / "whole")
    assert store.ids.tolist() == whole.ids.tolist()
    np.testing.assert_allclose(store.features("nuclear_norm"), whole.features("nuclear_norm"), rtol=1e-5)
    # the longer data set is the store's own from now on
    assert len(score_dataset(small_llama, tokenizer, pool.select(range(7)), tmp_path / "s").manifest.cost) == 2


@pytest.mark.parametrize("rows", [[1, 0, 2, 3, 4], [0, 1, 2], [0, 1, 4, 2, 3]], ids=["changed", "removed", "inserted"])
def test_changed_removed_or_inserted_rows_are_no_append(small_llama, tokenizer, pool, tmp_path, rows):
    score_dataset(small_llama, tokenizer, pool.select(range(4)), tmp_path / "s")
    with pytest.raises(StoreError, match="belongs to another run: data differs") as caught:
        score_dataset(small_llama, tokenizer, pool.select(rows), tmp_path / "s", ScoreConfig(append=True))
    assert f"{len(rows)} rows, fingerprint" in str(caught.value)
    assert "4 rows, fingerprint" in str(caught.value)


def test_changed_ids_are_changed_data(small_llama, tokenizer, pool, tmp_path):
    data = pool.select(range(3))
    score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(id_column="id"))
    renamed = data.map(lambda row: {"id": row["id"] + "x"})
    with pytest.raises(StoreError, match="data differs"):
        score_dataset(small_llama, tokenizer, renamed, tmp_path / "s", ScoreConfig(id_column="id"))


def test_stores_of_two_nodes_merge_and_doubled_samples_are_kept_once(small_llama, tokenizer, pool, tmp_path, capsys):
    data = pool.select(range(6))
    config = ScoreConfig(shard_rows=2, limit=4)
    first = score_dataset(small_llama, tokenizer, data, tmp_path / "a", config)
    second = score_dataset(small_llama, tokenizer, data, tmp_path / "b", ScoreConfig(shard_rows=4))
    for path in second.shard_paths()[1:]:
        path.unlink()
    assert MergeCommand(stores=(first.path, second.path), out=tmp_path / "c").run() == 0
    joined = FeatureStore.open(tmp_path / "c")
    assert f"{len(joined)} samples" in capsys.readouterr().out
    assert len(joined) == len(set(joined.ids)) <= 6
    finished = score_dataset(small_llama, tokenizer, data, tmp_path / "c")
    assert finished.verify() == []
    assert len(finished) == 6
    other = score_dataset(small_llama, tokenizer, data, tmp_path / "d", ScoreConfig(layers=(0,)))
    with pytest.raises(StoreError, match="layers differs"):
        merge([first.path, other.path], tmp_path / "e")
    assert not (tmp_path / "e").exists()


# memory --------------------------------------------------------------------------------------------------------------


def test_queue_packs_anew_after_a_batch_did_not_fit():
    queue = BatchQueue(made_up(10, 10, 10, 10, 4), 40)
    batch = queue.pop()
    assert [s.row for s in batch] == [0, 1, 2, 3]
    queue.put_back(batch)
    queue.tokens_per_batch = 20
    assert [[s.row for s in queue.pop()] for _ in range(3)] == [[0, 1], [2, 3], [4]]
    assert not queue


def test_batches_hold_every_sample_once_within_the_budget():
    samples = made_up(*range(1, 60), 7, 7, 7)
    batches = token_budget_batches(samples, 100)
    assert sorted(s.row for batch in batches for s in batch) == list(range(len(samples)))
    assert all(len(batch) * max(s.n_tokens for s in batch) <= 100 for batch in batches)


@pytest.mark.parametrize("tokens", [64, 4096])
def test_last_batches_that_several_take_are_small_and_the_first_are_full(tokens):
    samples = made_up(*[8] * 500)
    batches = token_budget_batches(samples, tokens, takers=3)
    assert sorted(s.row for batch in batches for s in batch) == list(range(500))
    sizes = [8 * len(batch) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == min(tokens, max(500 * 8 // 6 // 8 * 8, tokens // 2))
    assert sizes[-1] <= max(tokens // 2, 8)
    # whoever is free takes the next
    busy = [0, 0, 0]
    for size in sizes:
        busy[busy.index(min(busy))] += size
    assert max(busy) - min(busy) <= tokens // 2


def test_shares_of_ranks_are_level_and_hold_every_sample_once():
    samples = made_up(*range(5, 90))
    shares = deal(samples, 3)
    assert sorted(s.row for share in shares for s in share) == list(range(len(samples)))
    tokens = [sum(s.n_tokens for s in share) for share in shares]
    assert max(tokens) - min(tokens) <= 89


def test_batch_that_does_not_fit_is_halved_and_so_are_those_that_come_later():
    tried, rows = [], []

    def scarce(batch: Batch) -> list[dict[str, Any]]:
        tried.append([sample.row for sample in batch.samples])
        if batch.input_ids.numel() > 20:
            raise torch.OutOfMemoryError("scarce")
        return [{"row": sample.row} for sample in batch.samples]

    batches = token_budget_batches(made_up(*[10] * 8), 40)
    assert measure(scarce, rows.append, iter(batches), 40, lambda samples: collate(samples, 3)) == 20
    assert tried == [[0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7]]
    assert [row["row"] for row in rows] == list(range(8))


def test_out_of_memory_halves_the_budget_and_the_store_remembers_it(
    small_llama, tokenizer, pool, tmp_path, monkeypatch
):
    original = FeatureExtractor.__call__
    tried = []

    def scarce(self, batch):
        tried.append(batch.input_ids.numel())
        if len(tried) > 3 and batch.input_ids.numel() > 600:
            raise torch.OutOfMemoryError("scarce")
        return original(self, batch)

    data = pool.select(range(10))
    monkeypatch.setattr(FeatureExtractor, "__call__", scarce)
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s")
    assert len(store) == 10
    assert store.verify() == []
    budget = store.manifest.cost[-1]["tokens_per_batch"]
    assert budget < 4096
    tried.clear()
    score_dataset(small_llama, tokenizer, pool.select(range(13)), tmp_path / "s", ScoreConfig(append=True))
    assert max(tried[3:]) <= budget


def test_sample_that_does_not_fit_alone_gets_a_status(small_llama, tokenizer, pool, tmp_path, monkeypatch):
    original = FeatureExtractor.__call__
    data = pool.select(range(6))
    calls = []

    def scarce(self, batch):
        calls.append(batch)
        if len(calls) > 3 and batch.input_ids.shape[1] > 150:
            raise torch.OutOfMemoryError("scarce")
        return original(self, batch)

    monkeypatch.setattr(FeatureExtractor, "__call__", scarce)
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s")
    table = store.to_arrow(["status", "n_tokens", "effective_rank"]).to_pylist()
    assert {row["status"] for row in table} == {"ok", "error: out of memory"}
    assert all(
        (row["status"] == "ok") == (row["n_tokens"] <= 150) == (None not in row["effective_rank"]) for row in table
    )


def features_of(model, batch: Batch, **options) -> dict[str, np.ndarray]:
    extractor = FeatureExtractor(model, find_targets(model), "high", **options)
    with extractor.attached():
        rows = extractor(batch)
    return {name: np.stack([row[name] for row in rows]) for name in MEASURES} | {
        "loss": np.array([row["loss"] for row in rows])
    }


@pytest.fixture
def samples(tokenizer, pool) -> list[Sample]:
    rows = [{"prompt": r["prompt"], "completion": r["completion"]} for r in pool.select(range(5))]
    return list(Encoder(tokenizer, 512, "error").encode(rows, [str(i) for i in range(5)], [None] * 5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_joined_sequences_give_what_padded_ones_give(small_llama, samples, attention):
    small_llama.set_attn_implementation(attention)
    padded, joined = features_of(small_llama, collate(samples, 3)), features_of(small_llama, join(samples))
    for name, expected in padded.items():
        np.testing.assert_allclose(joined[name], expected, rtol=1e-5)


def test_joined_sequences_of_one_sample_add_up(small_llama, samples):
    pairs = [Sample(f"pair{i}", i, None, samples[i].sequences + samples[i + 1].sequences) for i in (0, 2)]
    padded, joined = features_of(small_llama, collate(pairs, 3)), features_of(small_llama, join(pairs))
    for name, expected in padded.items():
        np.testing.assert_allclose(joined[name], expected, rtol=1e-5)


def test_checkpointing_changes_no_number(small_llama, samples):
    kept, recomputed = (
        features_of(small_llama, collate(samples, 3)),
        features_of(small_llama, collate(samples, 3), checkpoint=True),
    )
    for name, expected in kept.items():
        np.testing.assert_allclose(recomputed[name], expected, rtol=1e-5)


def test_padding_free_run_equals_a_padded_one(small_llama, tokenizer, pool, tmp_path):
    data = pool.select(range(8))
    padded = score_dataset(small_llama, tokenizer, data, tmp_path / "padded")
    joined = score_dataset(
        small_llama, tokenizer, data, tmp_path / "joined", ScoreConfig(padding_free=True, checkpoint=True)
    )
    assert joined.manifest.fingerprint == padded.manifest.fingerprint
    for name in MEASURES:
        np.testing.assert_allclose(joined.features(name), padded.features(name), rtol=1e-5)


def test_log_probabilities_need_no_copy_of_the_logits_and_have_the_same_gradient(small_llama, samples):
    """The chunked log-softmax against autograd's, in float64 and over several chunks."""
    torch.manual_seed(0)
    batch = collate(samples, 3)
    logits = torch.randn(*batch.input_ids.shape, 37, dtype=torch.float64, requires_grad=True)
    batch.input_ids.remainder_(37)
    weights = torch.randn(5, dtype=torch.float64)
    (found,) = torch.autograd.grad(sequence_log_probs(logits, batch) @ weights, logits)
    each = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    (expected,) = torch.autograd.grad((each * batch.loss_mask[:, 1:]).sum(1) @ weights, logits)
    torch.testing.assert_close(found, expected)


def test_gradient_of_a_token_that_the_model_is_sure_of_is_more_than_rounding(small_llama, samples):
    """Probabilities of 1 − 1e-3 … 1 − 1e-8, which float32 could not tell from 1."""
    torch.manual_seed(0)
    batch = collate(samples, 3)
    logits = torch.randn(*batch.input_ids.shape, 37, dtype=torch.float32)
    batch.input_ids.remainder_(37)
    sure = torch.linspace(10, 22, logits.shape[1] - 1).expand(5, -1)[..., None]
    logits[:, :-1].scatter_(2, batch.input_ids[:, 1:, None], sure)
    logits += 25.0
    found, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    values = []
    for given in (found, exact):
        values.append(sequence_log_probs(given, batch))
        values[-1].sum().backward()
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)
    assert found.grad is not None
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize("before", [True, False])
def test_attention_by_cudnn_is_off_for_the_time_of_a_run(small_llama, before):
    said = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with FeatureExtractor(small_llama, find_targets(small_llama), "high").attached():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(said)


# what it says --------------------------------------------------------------------------------------------------------


def test_dry_run_reckons_the_whole_and_writes_nothing(small_llama, tokenizer, pool, tmp_path, capsys):
    data = pool.select(range(20))
    plan, estimate = estimate_run(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(tokens_per_batch=400))
    assert not (tmp_path / "s").exists()
    assert estimate is not None
    assert (estimate.samples, estimate.tokens) == (20, sum(s.n_tokens for s in plan.samples))
    assert estimate.seconds > 0
    show_estimate(plan, estimate)
    shown = capsys.readouterr().out
    for part in ("2 layers: q, k, v, o, gate, up, down; 14 matrices", "20 ok", "times an epoch", "nothing was written"):
        assert part in shown
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(tokens_per_batch=400))
    assert store.manifest.cost[0]["store_bytes"] < 20 * estimate.store_bytes
    assert estimate_run(small_llama, tokenizer, data, tmp_path / "s")[1] is None


def test_ledger_holds_time_bytes_and_the_ratio_to_an_epoch(small_llama, tokenizer, pool, tmp_path):
    store = score_dataset(small_llama, tokenizer, pool.select(range(6)), tmp_path / "s")
    (entry,) = store.manifest.cost
    assert entry["device_seconds"] == entry["seconds"] > 0
    assert entry["epoch_ratio"] > 1 / 3
    assert entry["store_bytes"] == sum(path.stat().st_size for path in store.shard_paths())


def test_ledger_says_what_the_time_went_to(small_llama, tokenizer, pool, tmp_path, capsys):
    store = score_dataset(small_llama, tokenizer, pool.select(range(6)), tmp_path / "s")
    (entry,) = store.manifest.cost
    phases = {name: sum(seconds) for name, seconds in entry["phases"].items()}
    assert min(phases.values()) >= 0
    assert phases.pop("preparing") > 0
    assert set(phases) == {"model", "factors", "spectra", "scores", "writing", "other", "waiting"}
    assert sum(phases.values()) == pytest.approx(entry["seconds"], abs=0.01)
    assert min(phases[name] for name in ("model", "factors", "spectra")) > 0
    summarize(store, 0.0)
    assert "s of preparing; then model " in capsys.readouterr().out
    older = {name: value for name, value in entry.items() if name != "phases"}
    assert time_by_phase(older) == "not recorded"


def test_clocks_read_what_has_happened_at_once_and_the_rest_when_asked():
    class Event:
        def __init__(self, happened: bool) -> None:
            self.happened = happened

        def query(self) -> bool:
            return self.happened

        def synchronize(self) -> None:
            self.happened = True

        def elapsed_time(self, last: Event) -> float:
            assert last.happened
            return 1500.0

    clocks = Clocks()
    events = [Event(True), Event(False), Event(True)]
    clocks._events.extend((name, Event(True), event) for name, event in zip("aba", events, strict=True))
    clocks.settle()
    assert clocks._seconds == {"a": 1.5}
    assert not events[1].happened, "nobody has waited"
    assert (clocks.seconds("a"), clocks.seconds("b")) == (3.0, 1.5)


def test_progress_line_speaks_for_all_processes():
    """Batches that are handed out: what has a lower number is finished, but for one batch that the other process is in."""
    batches = token_budget_batches(made_up(*[100] * 8), 200)
    progress = Progress([sample for batch in batches for sample in batch], shown=False)
    shown = []
    for batch in handed_out(batches, [0, 3, 5], 1, progress):
        shown.append((batch[0].row, str(progress).split(",")[0]))
    assert shown == [(0, "scoring: 0% of 8 samples"), (6, "scoring: 50% of 8 samples")]
    assert str(progress).startswith("scoring: 100% of 8 samples, ")


def test_progress_of_a_sharded_model_counts_the_batches_of_all_in_each_round():
    shares = [token_budget_batches(made_up(*lengths), 100) for lengths in ([100], [100, 100, 100])]
    progress = Progress([sample for share in shares for batch in share for sample in batch], shown=False)
    shown = [(len(batch), str(progress).split(" of ")[0]) for batch in in_step(shares, 0, progress)]
    assert shown == [(1, "scoring: 0%"), (0, "scoring: 50%"), (0, "scoring: 75%")]
    assert str(progress).startswith("scoring: 100% of 4 samples, ")


def test_durations_are_told_in_two_units():
    assert [duration(s) for s in (0.2, 61.0, 3600.0, 90_061.0)] == ["0 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]


# sketches ------------------------------------------------------------------------------------------------------------


def test_stored_sketches_are_those_of_the_gradients(small_llama, tokenizer, pool, tmp_path):
    data = pool.select(range(3))
    store = score_dataset(small_llama, tokenizer, data, tmp_path / "s", ScoreConfig(sketch_dimension=16))
    assert store.sketches().shape == (3, 14, 16)
    config = SketchConfig(dimension=16)
    samples = Encoder(tokenizer, 512, "error").encode(
        [{"prompt": r["prompt"], "completion": r["completion"]} for r in data], store.ids.tolist(), [None] * 3
    )
    targets = find_targets(small_llama)
    for found, sample in zip(store.sketches(), samples, strict=True):
        gradients = autograd_gradients(small_llama, sample, [target.spec.name for target in targets])
        for i, target in enumerate(targets):
            # a gradient G is (G as delta) and the identity as inputs
            gradient = gradients[target.spec.name].float()
            expected = sketch(
                torch.eye(gradient.shape[1])[None], gradient.mT[None].contiguous(), target.spec.key, config
            )[0]
            np.testing.assert_allclose(found[i], expected.numpy(), rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_store_without_sketches_says_how_to_get_them(small_llama, tokenizer, pool, tmp_path):
    store = score_dataset(small_llama, tokenizer, pool.select(range(2)), tmp_path / "s")
    with pytest.raises(StoreError, match="--sketch-dimension"):
        store.sketches()


def test_store_takes_little_room_for_a_model_of_28_layers(tmp_path):
    """28 layers, 7 projections and 4 measures of random numbers, which compress worst."""
    from selector.store.schema import Manifest
    from selector.store.writer import StoreWriter, create

    layers = tuple(
        LayerSpec(name=f"{i}", layer=i // 7, projection="qkvogud"[i % 7], in_features=8, out_features=8)
        for i in range(196)
    )
    manifest = Manifest(identity={}, layers=layers, expected=512)
    create(tmp_path / "s", manifest)
    writer = StoreWriter(tmp_path / "s", manifest)
    rng = np.random.default_rng(0)
    for row in range(512):
        features = {name: rng.lognormal(size=196).astype(np.float32) for name in MEASURES}
        head = {
            "sample_id": f"{row:016x}-0",
            "row": row,
            "n_tokens": row,
            "n_loss_tokens": row,
            "truncated": False,
            "status": "ok",
            "loss": 1.5,
        }
        writer.add(head | features)
    (path,) = (tmp_path / "s" / "shards").iterdir()
    assert path.stat().st_size / 512 <= 3500


# a small model for a large one ---------------------------------------------------------------------------------------


def test_store_agrees_with_itself_and_less_with_another_model(small_llama, tokenizer, pool, tmp_path, capsys):
    data = pool.select(range(30))
    first = score_dataset(small_llama, tokenizer, data, tmp_path / "a")
    for found in transfer(first, first):
        assert (found.samples, found.raw, found.controlled, found.top_overlap) == (
            30,
            pytest.approx(1),
            pytest.approx(1),
            1.0,
        )
        assert list(found.by_projection.values()) == pytest.approx([1.0] * 7)
    with torch.no_grad():
        for parameter in small_llama.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    second = score_dataset(small_llama, tokenizer, data.shuffle(seed=0), tmp_path / "b")
    by_measure = {found.measure: found for found in transfer(first, second)}
    assert by_measure["nuclear_norm"].samples == 30
    assert by_measure["nuclear_norm"].controlled < 1
    assert TransferCommand(first=first.path, second=second.path).run() == 0
    assert "rank correlation over 30 samples" in capsys.readouterr().out


def test_layers_are_matched_by_relative_depth():
    def table(count):
        return tuple(
            LayerSpec(name=str(i), layer=i, projection="q", in_features=1, out_features=1) for i in range(count)
        )

    assert matched_layers(table(3), table(5)) == {"q": [(0, 0), (1, 2), (2, 4)]}
    assert matched_layers(table(5), table(3)) == {"q": [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2)]}
