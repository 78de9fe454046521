"""Settings and fixtures that every test shares."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CI="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

# shapes and types of every public function are checked while tests run, and at no other time
from jaxtyping import install_import_hook

install_import_hook("selector", "beartype.beartype")

import importlib.util
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from selector.assets import POOL, TINY_MODEL

datasets.disable_progress_bars()

# `selector.integrations` lies beside the library and is put inside it when it is installed
if importlib.util.find_spec("selector.integrations") is None:
    folder = Path(__file__).parent.parent / "integrations"
    spec = importlib.util.spec_from_file_location(
        "selector.integrations", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["selector.integrations"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["selector.integrations"])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the embedded model."""
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="session")
def pool() -> datasets.Dataset:
    """The embedded rows: id, source, prompt, completion."""
    loaded = datasets.Dataset.from_json(str(POOL))
    assert isinstance(loaded, datasets.Dataset)
    return loaded


@pytest.fixture
def small_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A random float32 model of 2 layers, whose projections differ in every dimension."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)
