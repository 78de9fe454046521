"""Exports read by the loaders of the frameworks themselves, where those are installed; `test_export` holds them to the documented schemas."""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from test_export import ASK, ROWS, TELL, lines, make

from selector.export import export

pytestmark = pytest.mark.filterwarnings("ignore")
"""What these packages warn of is theirs."""

SINGLE = ("prompt-completion", "conversation", "messages", "instruction")
PAIRS = ("preference", "preference-conversation")


def loader(module: str) -> Any:
    """A module of a framework, or a reason not to run."""
    pytest.importorskip(module.split(".")[0], reason=f"{module.split('.')[0]} is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:
        pytest.skip(f"{module} cannot be imported here: {error}")


def asked(format: str) -> list[dict[str, str]]:
    """The prompt of the rows of a format, as messages."""
    if format == "instruction":
        return [{"role": "user", "content": "Add.\n2+2?"}]
    return ROWS["messages"]["messages"][:-1] if format == "messages" else [ASK]


@pytest.mark.parametrize("format", [*SINGLE, *PAIRS, "text"])
def test_llama_factory_converts_every_row(tmp_path, format):
    parser, converter = (loader(f"llamafactory.data.{name}") for name in ("parser", "converter"))
    data, _ = export(*make(format)[::-1], tmp_path, "llama-factory")
    (found,) = parser.get_dataset_list(["selected"], str(tmp_path))
    assert (found.load_from, tmp_path / found.dataset_name) == ("file", data)
    convert = converter.get_dataset_converter(found.formatting, found, SimpleNamespace(media_dir=""))
    for row in lines(data):
        read = convert(row)
        if format == "text":
            assert read["_prompt"] == [{"role": "user", "content": "2+2 is 4 ✓"}]
            continue
        system = [{"role": "system", "content": read["_system"]}] if read["_system"] else []
        assert system + read["_prompt"] == asked(format)
        assert read["_response"] == ([TELL, {"role": "assistant", "content": "5"}] if format in PAIRS else [TELL])


@pytest.mark.parametrize("format", [*SINGLE, *PAIRS, "text"])
def test_axolotl_accepts_the_settings_and_loads_the_file(tmp_path, monkeypatch, format):
    schemas, shared = loader("axolotl.utils.schemas.datasets"), loader("axolotl.utils.data.shared")
    values = loader("axolotl.utils.dict").DictDefault
    export(*make(format)[::-1], tmp_path, "axolotl")
    (entry,) = yaml.safe_load((tmp_path / "axolotl.yaml").read_text())["datasets"]
    kind = schemas.DPODataset if format in PAIRS else schemas.SFTDataset
    assert not set(entry) - set(kind.model_fields) - set(schemas.SFTDataset.model_fields)
    kind.model_validate(dict(entry))
    monkeypatch.chdir(tmp_path)
    loaded = shared.load_dataset_with_config(values(entry), False, False)
    assert len(loaded) == 3


@pytest.mark.parametrize("format", PAIRS)
def test_axolotl_renders_pairs(tmp_path, tokenizer, format):
    strategy = loader("axolotl.prompt_strategies.dpo.chat_template")
    values = loader("axolotl.utils.dict").DictDefault
    data, settings = export(*make(format)[::-1], tmp_path, "axolotl")
    transform, _ = strategy.default(values(yaml.safe_load(settings.read_text())))
    read = transform(lines(data)[0], tokenizer=tokenizer)
    assert "2+2?" in read["prompt"]
    assert read["chosen"].startswith("4 ✓")
    assert read["rejected"].startswith("5")


@pytest.mark.parametrize("format", [*SINGLE, *PAIRS])
def test_ms_swift_loads_every_row(tmp_path, monkeypatch, format):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    swift = loader("swift.dataset")
    (data,) = export(*make(format)[::-1], tmp_path, "ms-swift")
    loaded, _ = swift.load_dataset(str(data), strict=True, load_from_cache_file=False)
    assert len(loaded) == 3
    assert loaded[0]["messages"] == [*asked(format), TELL]
    if format in PAIRS:
        assert loaded[0]["rejected_messages"] == [ASK, {"role": "assistant", "content": "5"}]


@pytest.mark.parametrize("format", SINGLE)
def test_verl_serves_prompts(tmp_path, tokenizer, format):
    prompts, settings = loader("verl.utils.dataset.rl_dataset").RLHFDataset, loader("omegaconf").OmegaConf
    (data,) = export(*make(format)[::-1], tmp_path, "verl")
    config = {"cache_dir": str(tmp_path / "cache"), "max_prompt_length": 512, "filter_overlong_prompts_workers": 1}
    served = prompts([str(data)], tokenizer, settings.create(config))
    assert len(served) == 3
    assert served[0]["raw_prompt"] == asked(format)
    assert served[0]["reward_model"]["ground_truth"] == "4 ✓"


@pytest.mark.parametrize("format", SINGLE)
def test_verl_serves_conversations(tmp_path, tokenizer, format):
    conversations = loader("verl.utils.dataset.multiturn_sft_dataset").MultiTurnSFTDataset
    (data,) = export(*make(format)[::-1], tmp_path, "verl")
    served = conversations([str(data)], tokenizer, {"max_length": 128})
    assert len(served) == 3
    assert list(served.messages[0]) == [*asked(format), TELL]
