"""Every loss against TRL's trainers, and against one sample at a time in plain float64 arithmetic."""

from __future__ import annotations

import copy
import math

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import dense_measures
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from selector.batching import collate
from selector.data.samples import Encoder, Sample, TokenSequence
from selector.errors import ConfigError
from selector.gradients.losses import LossSettings, losses, reference_log_probs, sample_losses
from selector.gradients.targets import find_targets
from selector.scorer.features import FeatureExtractor
from selector.types import MEASURES

PAD = 3
PAIRS = [
    {"prompt": "The sky is", "chosen": " blue on most days.", "rejected": " green."},
    {
        "prompt": "Two and two",
        "chosen": " make four",
        "rejected": " are a number of things, depending on who is asked.",
    },
]
GROUPS = [
    {"prompt": "Count:", "completions": [" one two three", " four", " a b c d e"], "advantages": [1.0, -0.5, -0.5]},
    {
        "prompt": "Say something nice.",
        "completions": [" No.", " You look well today.", " Hm"],
        "advantages": [-0.7, 1.4, -0.7],
    },
]
SETTINGS = {
    "response": LossSettings(),
    "dpo": LossSettings(name="dpo", beta=0.3),
    "dapo": LossSettings(name="policy-gradient", normalizer="dapo"),
    "grpo": LossSettings(name="policy-gradient", normalizer="grpo"),
    "dr_grpo": LossSettings(name="policy-gradient", normalizer="dr_grpo", max_length=64),
}


def encode(tokenizer, rows, loss) -> list[Sample]:
    return list(
        Encoder(tokenizer, 512, "error", loss).encode(rows, [str(i) for i in range(len(rows))], [None] * len(rows))
    )


def samples_for(name, tokenizer) -> list[Sample]:
    if name == "response":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
        return encode(tokenizer, rows, "response")
    if name == "dpo":
        rows = [
            row | {"reference_chosen": -12.0 - i, "reference_rejected": -9.5 * (i + 1)} for i, row in enumerate(PAIRS)
        ]
        return encode(tokenizer, rows, "dpo")
    return encode(tokenizer, GROUPS, "policy-gradient")


def gradients(model, loss) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def losses_of(model, samples, settings) -> torch.Tensor:
    batch = collate(samples, PAD)
    return sample_losses(model(batch.input_ids, attention_mask=batch.attention_mask).logits, batch, settings)


def assert_same_gradients(found, expected, tolerance):
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-6
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < tolerance * scale, name


def plain_loss(model, sample, name) -> torch.Tensor:
    """One sample's loss written out token by token, without batches, padding or shared code."""
    sums, counts, advantages = [], [], []
    for sequence in sample.sequences:
        tokens = torch.tensor(sequence.input_ids.astype("int64"))
        log_probs = model(tokens[None]).logits[0].log_softmax(-1)
        terms = [log_probs[t - 1, tokens[t]] for t in range(1, len(tokens)) if sequence.loss_mask[t]]
        sums.append(sum(terms))
        counts.append(len(terms))
        advantages.append(sequence.advantage)
    if name == "response":
        return -sums[0] / counts[0]
    if name == "dpo":
        margin = (sums[0] - sample.sequences[0].reference) - (sums[1] - sample.sequences[1].reference)
        return torch.log(1 + torch.exp(-0.3 * margin))
    # exp(l - l0) is each token's importance ratio where l0 is l; their sum has this value and gradient
    surrogate = [a * (n + s - s.detach()) for a, n, s in zip(advantages, counts, sums, strict=True)]
    if name == "dapo":
        return -sum(surrogate) / sum(counts)
    if name == "grpo":
        return -sum(s / n for s, n in zip(surrogate, counts, strict=True)) / len(counts)
    return -sum(surrogate) / (len(counts) * 64)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_gives_the_sum_of_what_each_sample_gives_alone(small_llama, tokenizer, name):
    model = small_llama.double()
    samples = samples_for(name, tokenizer)
    found = losses_of(model, samples, SETTINGS[name])
    plain = [plain_loss(model, sample, name) for sample in samples]
    # stored log-probabilities travel in float32
    assert found.tolist() == pytest.approx([p.item() for p in plain], rel=1e-6)
    assert_same_gradients(gradients(model, found.sum()), gradients(model, sum(plain)), 1e-6)


# TRL asks models of transformers 5 by their old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("reference", ["a model", "stored log-probabilities", "the model itself"])
def test_dpo_loss_and_gradients_equal_those_of_the_dpo_trainer(small_llama, tokenizer, tmp_path, reference):
    torch.manual_seed(1)
    other = copy.deepcopy(small_llama)
    if reference != "the model itself":
        for parameter in other.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    args = DPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=512, beta=0.3, gradient_checkpointing=False,
        precompute_ref_log_probs=reference == "stored log-probabilities", per_device_train_batch_size=1,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=copy.deepcopy(small_llama), ref_model=copy.deepcopy(other), args=args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(PAIRS),
    )  # fmt: skip
    for row, prepared in zip(PAIRS, trainer.train_dataset, strict=True):
        expected = trainer.compute_loss(trainer.model, trainer.data_collator([prepared]))
        if reference == "stored log-probabilities":
            row = row | {f"reference_{side}": float(prepared[f"ref_{side}_logps"]) for side in ("chosen", "rejected")}
        (sample,) = encode(tokenizer, [row], "dpo")
        batch = collate([sample], PAD)
        if reference == "a model":
            batch.reference[:] = reference_log_probs(other, batch)
        logits = small_llama(batch.input_ids, attention_mask=batch.attention_mask).logits
        (loss,) = sample_losses(logits, batch, SETTINGS["dpo"])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        if reference == "the model itself":
            assert loss.item() == pytest.approx(math.log(2))
        assert_same_gradients(gradients(small_llama, loss), gradients(trainer.model, expected), 1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_policy_gradient_equals_that_of_the_grpo_trainer(small_llama, tokenizer, tmp_path, loss_type):
    args = GRPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, loss_type=loss_type, beta=0.0, num_generations=3,
        per_device_train_batch_size=3, max_completion_length=64, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=copy.deepcopy(small_llama), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        processing_class=tokenizer, train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in GROUPS]),
    )  # fmt: skip
    trainer.model.eval()  # in training, the trainer also divides by its accumulation steps
    # one group without batch mates is all that a local batch holds, so that bnpo and dapo count the same tokens
    settings = SETTINGS["dapo" if loss_type == "bnpo" else loss_type]
    for sample in encode(tokenizer, GROUPS, "policy-gradient"):
        batch = collate([sample], PAD)
        prompt = int(sample.sequences[0].loss_mask.argmax())
        inputs = {
            "prompt_ids": batch.input_ids[:, :prompt], "prompt_mask": batch.attention_mask[:, :prompt],
            "completion_ids": batch.input_ids[:, prompt:], "completion_mask": batch.attention_mask[:, prompt:],
            "advantages": batch.advantage, "num_items_in_batch": batch.loss_mask.sum(),
        }  # fmt: skip
        expected = trainer.compute_loss(trainer.model, inputs)
        (loss,) = losses_of(small_llama, [sample], settings)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
        assert_same_gradients(gradients(small_llama, loss), gradients(trainer.model, expected), 1e-4)


@pytest.mark.parametrize("name", ["dpo", "dapo"])
def test_features_of_several_sequences_equal_dense_svd_of_autograd_gradients(small_llama, tokenizer, name):
    samples = samples_for(name, tokenizer)
    targets = find_targets(small_llama)
    extractor = FeatureExtractor(small_llama, targets, "high", loss=SETTINGS[name])
    with extractor.attached():
        rows = extractor(collate(samples, PAD))
    model = copy.deepcopy(small_llama).double()
    for sample, row in zip(samples, rows, strict=True):
        expected = gradients(model, plain_loss(model, sample, name))
        for i, target in enumerate(targets):
            measured = dense_measures(expected[f"{target.spec.name}.weight"])
            for measure in MEASURES:
                assert row[measure][i] == pytest.approx(measured[measure], rel=1e-3), (target.spec.key, measure)


def test_a_reference_model_counts_and_is_left_as_it_was(small_llama, tokenizer):
    torch.manual_seed(1)
    other = copy.deepcopy(small_llama).train()
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    samples = encode(tokenizer, PAIRS, "dpo")
    found = {}
    for name, reference in (("itself", None), ("other", other)):
        extractor = FeatureExtractor(
            small_llama, find_targets(small_llama), "high", loss=SETTINGS["dpo"], reference=reference
        )
        with extractor.attached():
            found[name] = extractor(collate(samples, PAD))[0]
    assert found["itself"]["loss"] == pytest.approx(math.log(2))
    assert found["other"]["loss"] != pytest.approx(math.log(2), rel=1e-3)
    # a pair's gradient keeps its direction and is scaled by how sure the model is already
    np.testing.assert_allclose(found["itself"]["effective_rank"], found["other"]["effective_rank"], rtol=1e-3)
    assert all(module.training for module in other.modules())
    assert all(parameter.grad is None for parameter in other.parameters())


def test_a_sample_without_loss_tokens_has_no_loss_and_no_gradient(small_llama):
    tokens = np.array([5, 6, 7], dtype=np.int32)
    nothing = Sample("0", 0, None, (TokenSequence(tokens, np.zeros(3, dtype=bool), None, 1.0),) * 2)
    for settings in (SETTINGS["response"], SETTINGS["dapo"], SETTINGS["grpo"]):
        loss = losses_of(small_llama, [nothing], settings)
        assert loss.tolist() == [0.0]
        assert all(not gradient.any() for gradient in gradients(small_llama, loss.sum()).values())


def test_logits_in_bfloat16_are_summed_in_float32(small_llama, tokenizer):
    samples = samples_for("response", tokenizer)
    batch = collate(samples, PAD)
    logits = small_llama(batch.input_ids, attention_mask=batch.attention_mask).logits.bfloat16()
    expected = F.cross_entropy(
        logits.double()[0, :-1][batch.loss_mask[0, 1:]], batch.input_ids[0, 1:][batch.loss_mask[0, 1:]]
    )
    assert sample_losses(logits, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown loss") as caught:
        losses["dopo"]
    assert "dpo" in str(caught.value)
