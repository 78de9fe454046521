"""Routed experts: one number per layer and projection out of many matrices, whatever the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from families import (
    FAMILIES,
    build,
    captured_gradients,
    close,
    full_gradient,
    random_samples,
    run_capture,
    weight_gradients,
)  # fmt: skip
from oracles import dense_measures
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from selector.batching import collate
from selector.cli.inspect import InfoCommand
from selector.errors import ModelError
from selector.gradients.experts import Routing, by_pair
from selector.gradients.targets import find_targets, unmeasured
from selector.scorer.features import FeatureExtractor, sample_row
from selector.store import FeatureStore
from selector.store.schema import EXPERTS_HIT, Manifest
from selector.store.writer import StoreWriter, create, write_manifest, write_settings
from selector.types import MEASURES

LLAMA, MIXTRAL, QWEN = (FAMILIES[name] for name in ("llama", "mixtral", "qwen3_moe"))


@pytest.fixture(scope="module")
def mixtral():
    return build(MIXTRAL)


def features_of(model, samples):
    extractor = FeatureExtractor(model, find_targets(model), "high")
    with extractor.attached():
        return {row["sample_id"]: row for row in extractor(collate(samples, 0))}


def routed_tokens(model, sample) -> list[torch.Tensor]:
    """Experts that each token of a sample goes to, layer by layer, as the routers say."""
    chosen = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
        for layer in model.model.layers
    ]
    model(input_ids=torch.tensor(sample.sequences[0].input_ids[None].astype("int64")))
    for handle in handles:
        handle.remove()
    return chosen


def test_features_are_means_over_the_experts_hit_weighted_by_their_tokens(mixtral):
    """A token counts where it can change the loss: all but the last one, and in the last layer those that predict."""
    (sample,) = random_samples(14)
    row = features_of(mixtral, [sample])["s0"]
    gradients = weight_gradients(mixtral, sample)
    mask = torch.tensor(sample.sequences[0].loss_mask)
    counting = [torch.arange(14) < 13, torch.cat([mask[1:], torch.tensor([False])])]
    for i, target in enumerate(find_targets(mixtral)):
        if target.stack is None:
            continue
        experts = routed_tokens(mixtral, sample)[target.spec.layer][counting[target.spec.layer]].flatten()
        gradient = gradients[f"{target.spec.name}.{target.stack.name}"]
        half = slice(None) if target.columns is None else slice(target.columns.start, target.columns.stop)
        for name in MEASURES:
            expected = np.mean([dense_measures(gradient[e][half])[name] for e in experts.tolist()])
            assert row[name][i] == pytest.approx(expected, rel=1e-5), (target.spec.key, name)


def test_experts_hit_are_those_that_the_router_chose_for_tokens_with_a_gradient(mixtral):
    samples = random_samples(14, 3)
    rows = features_of(mixtral, samples)
    for sample in samples:
        mask = torch.tensor(sample.sequences[0].loss_mask)
        counting = [torch.arange(len(mask)) < len(mask) - 1, torch.cat([mask[1:], torch.tensor([False])])]
        chosen = routed_tokens(mixtral, sample)
        for i, target in enumerate(find_targets(mixtral)):
            found, layer = rows[sample.sample_id][EXPERTS_HIT][i], target.spec.layer
            if target.spec.is_routed:
                assert found == len(set(chosen[layer][counting[layer]].flatten().tolist())), target.spec.key
            else:
                assert np.isnan(found)


def test_experts_hit_are_a_column_that_older_shards_lack(mixtral, tmp_path, capsys):
    specs = tuple(target.spec for target in find_targets(mixtral))
    manifest = Manifest(identity={"model": "mixtral"}, layers=specs, expected=4)
    store, rows = tmp_path / "store", features_of(mixtral, random_samples(14, 3, 9, 5))
    create(store, manifest)
    rows["s3"] = sample_row(random_samples(14, 3, 9, 5)[3], "nonfinite")
    writer = StoreWriter(store, manifest, shard_rows=2)
    for row in rows.values():
        writer.add(row)
    opened = FeatureStore.open(store)
    assert opened.to_arrow().schema.field(EXPERTS_HIT).type.value_type == pa.uint16()
    expected = np.stack([rows[f"s{i}"][EXPERTS_HIT] for i in range(3)] + [np.full(len(specs), np.nan)])
    np.testing.assert_array_equal(opened.experts_hit(), expected)
    assert InfoCommand(store=store).run() == 0
    assert EXPERTS_HIT in capsys.readouterr().out

    # the shard as it was before there was the column
    (path, _) = opened.shard_paths()
    table = pq.read_table(path)
    path.unlink()
    writer.write(table.drop_columns([EXPERTS_HIT]))
    write_settings(store, replace(manifest, command={"command": "score"}))
    write_manifest(store, manifest)
    opened = FeatureStore.open(store)
    assert opened.verify() == []
    for columns in (None, ["row", EXPERTS_HIT]):
        assert opened.to_arrow(columns)[EXPERTS_HIT].null_count == 0
    expected[:2] = np.nan
    np.testing.assert_array_equal(opened.experts_hit(), expected)
    np.testing.assert_array_equal(opened.features("effective_rank")[0], rows["s0"]["effective_rank"])


def test_a_model_without_experts_writes_no_such_column():
    extractor_row = features_of(build(LLAMA), random_samples(5))["s0"]
    specs = tuple(target.spec for target in find_targets(build(LLAMA)))
    assert EXPERTS_HIT not in extractor_row
    assert EXPERTS_HIT not in Manifest(identity={}, layers=specs, expected=1).schema.names


def test_features_of_experts_do_not_depend_on_batch_mates_padding_or_order(mixtral):
    samples = random_samples(11, 5, 9)
    together = features_of(mixtral, samples[::-1])
    for sample in samples:
        alone = features_of(mixtral, [sample])[sample.sample_id]
        for name in MEASURES:
            np.testing.assert_allclose(together[sample.sample_id][name], alone[name], rtol=1e-5)


def test_pairs_come_once_and_count_every_token_for_each_of_its_experts(mixtral):
    """In the first layer all tokens but the last change the loss."""
    counts, seen = {}, set()

    def keep(factors):
        if factors.experts is not None and factors.specs[0].layer == 0:
            pairs = factors.experts
            for sample, expert, tokens in zip(
                pairs.sample.tolist(), pairs.expert.tolist(), pairs.tokens.tolist(), strict=True
            ):
                key = (factors.specs[0].key, sample)
                assert (key, expert) not in seen
                seen.add((key, expert))
                counts[key] = counts.get(key, 0) + tokens

    run_capture(mixtral, find_targets(mixtral), collate(random_samples(11, 5), 0), keep)
    assert counts == {
        (f"0.expert_{part}", i): 2 * tokens for part in ("gate", "down") for i, tokens in ((0, 10), (1, 4))
    }


def test_model_computes_what_it_computed_and_its_experts_function_comes_back(mixtral):
    tokens = torch.tensor([random_samples(9)[0].sequences[0].input_ids.tolist()])
    before = mixtral(input_ids=tokens).logits
    registered = list(ALL_EXPERTS_FUNCTIONS)
    inside = []
    handle = mixtral.register_forward_hook(lambda module, inputs, output: inside.append(output.logits.detach()))
    run_capture(mixtral, find_targets(mixtral), collate(random_samples(9), 0), lambda factors: None)
    handle.remove()
    torch.testing.assert_close(inside[0], before)
    assert mixtral.config._experts_implementation == "eager"
    assert list(ALL_EXPERTS_FUNCTIONS) == registered
    assert torch.equal(mixtral(input_ids=tokens).logits, before)


def test_experts_behind_activation_checkpointing():
    model = build(QWEN)
    targets, batch = find_targets(model), collate(random_samples(8, 6), 0)
    found = captured_gradients(model, targets, batch, checkpoint=True)
    plain = captured_gradients(model, targets, batch)
    assert set(found) == set(plain)
    for key in plain:
        torch.testing.assert_close(found[key], plain[key])


class ListedExperts(nn.Module):
    """A block of routed experts as models had it before transformers 5, and as code beside checkpoints has it."""

    def __init__(self, hidden: int, intermediate: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts)
        sizes = {"w1": (hidden, intermediate), "w3": (hidden, intermediate), "w2": (intermediate, hidden)}
        self.experts = nn.ModuleList(
            Expert({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(experts)
        )

    def forward(self, x):
        hidden = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(hidden).softmax(-1).topk(2)
        total = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            token, place = (chosen == index).nonzero(as_tuple=True)
            rows = expert(hidden[None, token].reshape(-1, x.shape[-1]))
            total = total.index_add(0, token, rows * weights[token, place, None])
        return total.view_as(x)


class Expert(nn.ModuleDict):
    def forward(self, x):
        return self["w2"](F.silu(self["w1"](x)) * self["w3"](x))


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=["kept", "recomputed"])
def test_experts_in_a_list_equal_autograd_gradients(options):
    model = build(LLAMA)
    for layer in model.model.layers:
        layer.mlp = ListedExperts(16, 6, 4).double()
    targets = find_targets(model)
    assert [t.spec.projection for t in targets] == ["q", "k", "v", "o", "expert_gate", "expert_up", "expert_down"] * 2
    assert unmeasured(model, targets) == ["model.layers.N.mlp.gate"]
    samples = random_samples(9, 5)
    found = captured_gradients(model, targets, collate(samples, 0), **options)
    for i, sample in enumerate(samples):
        gradients = weight_gradients(model, sample)
        for target in targets:
            expected = full_gradient(target, gradients)
            close(found[target.spec.key][i][: len(expected)], expected)


def test_experts_whose_tokens_cannot_be_told_are_refused():
    model = build(LLAMA)
    for layer in model.model.layers:
        layer.mlp = ListedExperts(16, 6, 4).double()
        layer.mlp.experts[0].register_forward_pre_hook(lambda module, inputs: inputs[0] * 1)
    with pytest.raises(ModelError, match="it cannot be told which tokens an expert got"):
        captured_gradients(model, find_targets(model), collate(random_samples(30), 0))


def test_routers_are_reported_as_not_measured(mixtral):
    assert unmeasured(mixtral, find_targets(mixtral)) == ["model.layers.N.mlp.gate"]


def test_pairs_are_padded_to_others_of_about_their_length():
    """One expert takes 64 tokens of a sample, many take one: their rows are not padded to 64."""
    expert = torch.cat([torch.zeros(64, dtype=torch.long), torch.arange(1, 33)])
    token = torch.arange(96)
    x, delta = torch.randn(96, 3), torch.randn(96, 2)
    groups = list(by_pair(x, delta, Routing(token, expert, 96, 33), torch.zeros(96, dtype=torch.long)))
    assert sorted(tuple(rows.shape) for rows, _, _ in groups) == [(1, 64, 3), (32, 1, 3)]
    assert sorted(pairs.tokens.tolist() for _, _, pairs in groups) == [[1] * 32, [64]]


def test_rows_without_gradient_are_left_out():
    delta = torch.ones(4, 2)
    delta[1:3] = 0
    routing = Routing(torch.arange(4), torch.tensor([0, 0, 1, 2]), 4, 3)
    ((x, _, pairs),) = by_pair(torch.randn(4, 3), delta, routing, torch.zeros(4, dtype=torch.long))
    assert pairs.expert.tolist() == [0, 2]
    assert x.shape == (2, 1, 3)
    assert list(by_pair(torch.randn(4, 3), torch.zeros(4, 2), routing, torch.zeros(4, dtype=torch.long))) == []
