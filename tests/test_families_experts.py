"""Routed experts: one number per layer and projection out of many matrices, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import ROUTED, build, captured_gradients, random_samples, run_capture, weight_gradients
from oracles import dense_measures
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from selector.batching import collate
from selector.gradients.experts import Routing, by_pair
from selector.gradients.targets import find_targets, unmeasured
from selector.scorer.features import FeatureExtractor
from selector.types import MEASURES

MIXTRAL, QWEN = (parameter.values[0] for parameter in ROUTED[:2])


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
    handles = [layer.mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output[2])) for layer in model.model.layers]
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
        gradient = gradients[f"{target.spec.name}.{target.stack.parameter}"]
        half = slice(None) if target.columns is None else slice(target.columns.start, target.columns.stop)
        for name in MEASURES:
            expected = np.mean([dense_measures(gradient[e][half])[name] for e in experts.tolist()])
            assert row[name][i] == pytest.approx(expected, rel=1e-5), (target.spec.key, name)


def test_features_of_experts_do_not_depend_on_batch_mates_padding_or_order(mixtral):
    samples = random_samples(11, 5, 9)
    together = features_of(mixtral, samples[::-1])
    for sample in samples:
        alone = features_of(mixtral, [sample])[sample.sample_id]
        for name in MEASURES:
            np.testing.assert_allclose(together[sample.sample_id][name], alone[name], rtol=1e-5)


def test_shares_of_a_sample_sum_to_one_and_pairs_come_once(mixtral):
    shares, seen = {}, set()

    def keep(factors):
        if factors.experts is not None:
            for sample, expert, share in zip(*(t.tolist() for t in (factors.experts.sample, factors.experts.expert, factors.experts.share)), strict=True):
                name = (factors.specs[0].key, sample)
                assert (name, expert) not in seen
                seen.add((name, expert))
                shares[name] = shares.get(name, 0) + share

    run_capture(mixtral, find_targets(mixtral), collate(random_samples(11, 5), 0), keep)
    assert len(shares) == 2 * 2 * 2
    assert all(total == pytest.approx(1) for total in shares.values())


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


def test_routers_are_reported_as_not_measured(mixtral):
    assert unmeasured(mixtral, find_targets(mixtral)) == ["model.layers.N.mlp.gate"]


def test_pairs_are_padded_to_others_of_about_their_length():
    """One expert takes 64 tokens of a sample, many take one: their rows are not padded to 64."""
    expert = torch.cat([torch.zeros(64, dtype=torch.long), torch.arange(1, 33)])
    token = torch.arange(96)
    x, delta = torch.randn(96, 3), torch.randn(96, 2)
    groups = list(by_pair(x, delta, Routing(token, expert, 96, 33), torch.zeros(96, dtype=torch.long)))
    assert sorted(tuple(rows.shape) for rows, _, _ in groups) == [(1, 64, 3), (32, 1, 3)]
    assert sum(float(pairs.share.sum()) for _, _, pairs in groups) == pytest.approx(1)


def test_rows_without_gradient_are_left_out():
    delta = torch.ones(4, 2)
    delta[1:3] = 0
    routing = Routing(torch.arange(4), torch.tensor([0, 0, 1, 2]), 4, 3)
    ((x, _, pairs),) = by_pair(torch.randn(4, 3), delta, routing, torch.zeros(4, dtype=torch.long))
    assert pairs.expert.tolist() == [0, 2]
    assert x.shape == (2, 1, 3)
    assert list(by_pair(torch.randn(4, 3), torch.zeros(4, 2), routing, torch.zeros(4, dtype=torch.long))) == []
