"""Scorers of forward passes against plain, unbatched references, on known values, and in what they must not depend on."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, build, random_samples
from torch import Tensor

from selector.batching import Batch, collate, join
from selector.config import ScoreConfig
from selector.data.samples import Encoder, Sample, TokenSequence
from selector.errors import ConfigError, ModelError
from selector.forward import ForwardPass, ForwardScores, Scorer, named_scorers, responses_alone, scorers
from selector.forward.scorers import angle_concentration, hidden_effective_rank, ifd, logit_nuclear_norm
from selector.gradients.targets import find_targets
from selector.scorer import score_dataset
from selector.scorer.clocks import FORWARD, SCORES
from selector.scorer.features import FeatureExtractor
from selector.testing import ContractError, check_scorer
from selector.types import MEASURES

TOLERANCE = 1e-5
"""Largest relative error of a float32 model's scores."""


@pytest.fixture
def samples(tokenizer, pool) -> list[Sample]:
    rows = [pool[i] for i in range(4)]
    parts = [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows]
    found = list(Encoder(tokenizer, 512, "error").encode(parts, [r["id"] for r in rows], [None] * len(rows)))
    pair = Sample("pair", 4, None, found[0].sequences + found[1].sequences)
    return [*found, pair]


def mean_loss(model, tokens: np.ndarray, predicted: np.ndarray) -> Tensor:
    """Sum of the cross-entropy of some tokens of one sequence, read alone."""
    ids = torch.tensor(tokens[None].astype("int64"))
    logits = model(input_ids=ids).logits[0, :-1]
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")[torch.tensor(predicted[1:])].sum()


def plain_ifd(model, sample: Sample, bos: int | None) -> float:
    """Two passes a sequence, of which the second has no prompt."""
    after, without = torch.zeros(()), torch.zeros(())
    for sequence in sample.sequences:
        ids, mask = sequence.input_ids, sequence.loss_mask
        response = ids[mask]
        if bos is not None and ids[0] == bos:
            response, counted = np.concatenate([[bos], response]), mask
        else:
            counted = mask & (np.arange(len(mask)) != mask.argmax())
        after = after + mean_loss(model, ids, counted)
        without = without + mean_loss(model, response, np.arange(len(response)) > 0)
    return float(after / without)


def states(model, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states, logits and loss mask of all tokens of a sample, its sequences one behind the other."""
    outputs = [
        model(input_ids=torch.tensor(s.input_ids[None].astype("int64")), output_hidden_states=True)
        for s in sample.sequences
    ]
    hidden = torch.cat([o.hidden_states[-1][0] for o in outputs])
    logits = torch.cat([o.logits[0] for o in outputs])
    return hidden, logits, torch.cat([torch.tensor(s.loss_mask) for s in sample.sequences])


def plain_scores(model, sample: Sample, bos: int | None = None) -> dict[str, float]:
    """Every score of one sample: a float64 copy of the model, no batch, no padding, whole matrices."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        hidden, logits, learned = states(model, sample)
        sigma = torch.linalg.svdvals(hidden)
        share = sigma[sigma > 0] / sigma.sum()
        cosines = F.cosine_similarity(hidden[:, None], hidden[None], dim=-1)
        return {
            "ifd": plain_ifd(model, sample, bos),
            "hidden_effective_rank": math.exp(-float((share * share.log()).sum())),
            "angle_concentration": float(cosines[learned][:, learned].mean() + cosines[learned][:, ~learned].mean()),
            "logit_nuclear_norm": float(torch.linalg.svdvals(logits).sum()),
        }


def rows_of(model, batch: Batch, *, names=tuple(scorers), targets=(), bos: int | None = None) -> dict[str, dict]:
    """Rows of the feature store by sample id."""
    extractor = FeatureExtractor(model, targets, "high", scorers=named_scorers(names), bos_token_id=bos)
    with extractor.attached():
        return {row["sample_id"]: row for row in extractor(batch)}


@pytest.mark.parametrize("layout", ["padded", "joined"])
def test_scores_equal_plain_references(small_llama, samples, layout):
    batch = collate(samples[:4], 3) if layout == "padded" else join(samples[:4])
    found = rows_of(small_llama, batch) | rows_of(small_llama, collate(samples[4:], 3))
    for sample in samples:
        for name, expected in plain_scores(small_llama, sample).items():
            assert found[sample.sample_id][name] == pytest.approx(expected, rel=TOLERANCE), (sample.sample_id, name)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "opt", "gpt2"])
def test_scores_of_other_families_equal_plain_references(name):
    """Logits that are capped or scaled, a head that reads a decoder inside the model, another name of the body."""
    model = build(FAMILIES[name])
    made = random_samples(9, 14)
    found = rows_of(model, collate(made, 0))
    for sample in made:
        for score, expected in plain_scores(model, sample).items():
            assert found[sample.sample_id][score] == pytest.approx(expected, rel=TOLERANCE), score


def test_ifd_keeps_a_begin_of_text_token_and_predicts_the_whole_response(small_llama, samples):
    begun = [
        Sample(s.sample_id, s.row, None, tuple(TokenSequence(np.concatenate([[0], q.input_ids]).astype(np.int32), np.concatenate([[False], q.loss_mask])) for q in s.sequences))
        for s in samples[:2]
    ]  # fmt: skip
    found = rows_of(small_llama, collate(begun, 3), names=("ifd",), bos=0)
    model = copy.deepcopy(small_llama).double().eval()
    for sample in begun:
        with torch.no_grad():
            expected = plain_ifd(model, sample, 0)
        assert found[sample.sample_id]["ifd"] == pytest.approx(expected, rel=TOLERANCE)
    alone = responses_alone(collate(begun, 3), 0)
    assert [s.n_loss_tokens for s in alone.samples] == [s.n_loss_tokens for s in begun]


def test_ifd_of_a_single_token_without_begin_of_text_is_none(small_llama):
    sample = Sample("one", 0, None, (TokenSequence(np.arange(5, 9, dtype=np.int32), np.arange(4) == 3),))
    row = rows_of(small_llama, collate([sample], 3))["one"]
    assert row["status"] == "ok"
    assert row["ifd"] is None
    assert row["loss"] > 0


def made_pass(logits: Tensor, mask: list[bool], hidden: Tensor | None = None, alone: ForwardPass | None = None) -> ForwardPass:  # fmt: skip
    """A pass of one sample whose tokens are 0, 1, 2 ..."""
    ids = np.arange(len(mask), dtype=np.int32)
    batch = collate([Sample("0", 0, None, (TokenSequence(ids, np.array(mask)),))], 0)
    return ForwardPass(batch, logits[None], None, None if hidden is None else hidden[None], alone)


def test_golden_values_by_hand():
    mask = [False, False, True, True]
    zeros = torch.zeros(4, 8)
    logits = zeros.clone()
    logits[2, 3] = math.log(7)  # the last token, at odds of 7 to 7: log 2 instead of log 8
    alone = made_pass(torch.zeros(2, 8), [False, True])
    assert ifd(made_pass(logits, mask, alone=alone)).item() == pytest.approx(1 / 3)
    orthogonal = torch.eye(4, 6) * torch.tensor([1.0, 1, 1, 1])[:, None]
    assert hidden_effective_rank(made_pass(zeros, mask, orthogonal)).item() == pytest.approx(4)
    assert hidden_effective_rank(made_pass(zeros, mask, torch.ones(4, 6))).item() == pytest.approx(1, rel=1e-6)
    assert angle_concentration(made_pass(zeros, mask, orthogonal)).item() == pytest.approx(0.5)
    assert angle_concentration(made_pass(zeros, mask, torch.ones(4, 6))).item() == pytest.approx(2)
    opposed = torch.tensor([[-1.0], [-2.0], [3.0], [4.0]])
    assert angle_concentration(made_pass(zeros, mask, opposed)).item() == pytest.approx(0)
    assert logit_nuclear_norm(made_pass(torch.diag(torch.tensor([1.0, 2, 3, 4])), mask)).item() == pytest.approx(10)
    tall = torch.cat([torch.diag(torch.tensor([1.0, 2])), torch.zeros(2, 2)])
    assert logit_nuclear_norm(made_pass(tall, mask)).item() == pytest.approx(3)


def test_golden_values_of_the_embedded_model(tokenizer, pool):
    """Pinned, so that a change of any definition is seen."""
    from transformers import AutoModelForCausalLM

    from selector.assets import TINY_MODEL

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype="float32")
    part = {"prompt": pool[0]["prompt"], "completion": pool[0]["completion"]}
    (sample,) = Encoder(tokenizer, 512, "error").encode([part], ["0"], [None])
    row = rows_of(model, collate([sample], 0), bos=tokenizer.bos_token_id)["0"]
    golden = {
        "angle_concentration": 0.633697, "hidden_effective_rank": 77.65352, "ifd": 0.879522, "logit_nuclear_norm": 15231.85,
    }  # fmt: skip
    assert {name: row[name] for name in golden} == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize("name", list(scorers))
def test_scorers_keep_their_contract(name):
    check_scorer(name)


def test_checker_sees_a_score_that_depends_on_batch_mates():
    scorers.register("broken")(Scorer(lambda forward: forward.logits.mean((1, 2)), higher_first=True, unit="logits"))
    try:
        with pytest.raises(ContractError, match="depends on batch mates or padding"):
            check_scorer("broken")
    finally:
        del scorers._parts["broken"]


def test_spectra_are_the_same_with_scorers_beside_them(small_llama, samples):
    targets = find_targets(small_llama)
    batch = collate(samples[:3], 3)
    both, spectra = (rows_of(small_llama, batch, names=names, targets=targets) for names in (tuple(scorers), ()))
    only = rows_of(small_llama, batch)
    for sample_id, row in both.items():
        for measure in MEASURES:
            np.testing.assert_allclose(row[measure], spectra[sample_id][measure], rtol=1e-6)
        assert row["loss"] == pytest.approx(only[sample_id]["loss"], rel=1e-6)
        for name in scorers:
            assert row[name] == pytest.approx(only[sample_id][name], rel=1e-6)


def test_forward_scores_run_no_backward_and_two_passes_for_ifd(small_llama, samples, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a backward pass was run")

    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    calls = []
    small_llama.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    rows_of(small_llama, collate(samples[:2], 3), names=("loss", "hidden_effective_rank"))
    assert calls == [False]
    rows_of(small_llama, collate(samples[:2], 3), names=("ifd",))
    assert calls == [False] * 3


def test_the_second_pass_costs_but_does_not_make_a_training_step_longer(small_llama, samples, monkeypatch):
    """The unit in which cost is told is three forward passes; a clock that ticks once a pass shows what is counted."""
    ticks = [0.0]
    monkeypatch.setattr("selector.scorer.clocks.time.perf_counter", lambda: ticks[0])
    small_llama.lm_head.register_forward_hook(lambda *_: ticks.__setitem__(0, ticks[0] + 1))
    extractor = FeatureExtractor(small_llama, (), "high", scorers=named_scorers(["ifd"]))
    with extractor.attached():
        extractor(collate(samples[:2], 3))
    assert ticks[0] == 2
    assert (extractor.clocks.seconds(FORWARD), extractor.clocks.seconds(SCORES)) == (1, 1)


def test_only_a_scorer_of_all_logits_asks_for_them(small_llama, samples):
    shapes = []
    small_llama.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    batch = collate(samples[:1], 3)
    rows_of(small_llama, batch, names=("hidden_effective_rank", "angle_concentration"))
    rows_of(small_llama, batch, names=("logit_nuclear_norm",))
    assert shapes == [samples[0].n_loss_tokens, samples[0].n_tokens]


def test_nonfinite_logits_have_a_status_and_no_number(small_llama, samples):
    with torch.no_grad():
        small_llama.model.norm.weight[0] = torch.nan
    row = rows_of(small_llama, collate(samples[:1], 3))[samples[0].sample_id]
    assert row["status"] == "nonfinite"
    assert row["loss"] is None
    assert not set(scorers) & set(row)


def test_model_is_left_as_it_was(small_llama, samples):
    small_llama.train()
    before = {n: (m.training, set(m.__dict__), len(m._forward_hooks)) for n, m in small_llama.named_modules()}
    rows_of(small_llama, collate(samples[:1], 3))
    assert {n: (m.training, set(m.__dict__), len(m._forward_hooks)) for n, m in small_llama.named_modules()} == before
    assert all(p.requires_grad for p in small_llama.parameters())


def test_unknown_scorers_are_named_all_at_once_with_the_ones_that_were_meant():
    with pytest.raises(ConfigError) as caught:
        named_scorers(["loss", "idf", "hidden_rank"])
    assert "'idf'" in str(caught.value)
    assert "'hidden_rank'" in str(caught.value)
    assert "did you mean 'ifd'" in str(caught.value)
    assert named_scorers(["spectra", "loss"]) == {}
    with pytest.raises(ConfigError, match="registered already"):
        scorers.register("ifd")(scorers["ifd"])


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ConfigError, match="nothing is measured"):
        ScoreConfig(scorers=())
    with pytest.raises(ConfigError, match="sketch_dimension has no effect without spectra"):
        ScoreConfig(scorers=("ifd",), sketch_dimension=4)


def test_model_without_an_output_head_of_its_own_is_refused():
    with pytest.raises(ModelError, match="last hidden states cannot be read"):
        ForwardScores(torch.nn.Linear(2, 2), named_scorers(["hidden_effective_rank"]))


def test_identity_ignores_order_and_is_the_old_one_for_spectra_alone(small_llama, tokenizer, pool, tmp_path):
    rows = pool.select(range(2))

    def fingerprint(out: str, *names: str) -> str:
        store = score_dataset(small_llama, tokenizer, rows, tmp_path / out, ScoreConfig(scorers=names))
        assert ("scores" in store.manifest.identity) == (names != ("spectra",))
        return store.manifest.fingerprint

    first = fingerprint("both", "spectra", "ifd")
    assert fingerprint("both", "ifd", "loss", "spectra", "ifd") == first
    found = {fingerprint("spectra", "spectra"), fingerprint("ifd", "ifd"), fingerprint("loss", "loss"), first}
    assert len(found) == 4
