"""Load the model whose gradients are measured, and recognize it again later."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from selector.config import Dtype
from selector.errors import ModelError, SelectorError, raise_all
from selector.scorer.sharding import whole
from selector.store.schema import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLED_VALUES = 64


def load_model(
    name: str,
    dtype: Dtype = "auto",
    *,
    device: torch.device | str = "cpu",
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: directory of a checkpoint, or name on the hub.
        dtype: number format; auto is float32 on CPU and the checkpoint's own elsewhere.
        device: where the model goes.
        chat_template: Jinja file that takes the place of the tokenizer's chat template.
        trust_remote_code: run code that comes with the checkpoint.
        allow_pickle: accept weights that are not safetensors; unpickling can run code.

    Raises:
        ModelError: model or tokenizer cannot be loaded; both problems at once.
    """
    from transformers import AutoModelForCausalLM

    _check_path(name)
    on_cpu = torch.device(device).type == "cpu"
    wanted = "float32" if dtype == "auto" and on_cpu else dtype
    problems: list[SelectorError] = []
    model = tokenizer = None
    try:
        tokenizer = load_tokenizer(name, chat_template=chat_template, trust_remote_code=trust_remote_code)
    except SelectorError as error:
        problems.append(error)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted, trust_remote_code=trust_remote_code, use_safetensors=None if allow_pickle else True
        )
    except Exception as error:  # transformers raises many kinds for a missing or broken model
        problems.append(
            _loading_problem("model", name, error, "check the name, the network, and that its weights are safetensors")
        )
    raise_all(problems)
    assert model is not None
    assert tokenizer is not None
    return model.to(device), tokenizer  # pyright: ignore[reportArgumentType]


def load_tokenizer(
    name: str, *, chat_template: Path | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, without the model.

    Args:
        name: directory of a checkpoint, or name on the hub.
        chat_template: Jinja file that takes the place of the tokenizer's chat template.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ModelError: the tokenizer or the chat template cannot be loaded; both problems at once.
    """
    from transformers import AutoTokenizer

    _check_path(name)
    problems: list[SelectorError] = []
    tokenizer = template = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        problems.append(
            _loading_problem("tokenizer", name, error, "save the tokenizer beside the model with `save_pretrained`")
        )
    try:
        template = chat_template.read_text(encoding="utf-8") if chat_template is not None else None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(
            ModelError("the chat template cannot be read", got=error, allowed="a Jinja file", fix="check the path")
        )
    raise_all(problems)
    assert tokenizer is not None
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _check_path(name: str) -> None:
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no model at {name}", fix="check the path; hub names look like organization/model")


def _loading_problem(what: str, name: str, error: Exception, fix: str) -> ModelError:
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return ModelError(
        f"the {what} of {name} cannot be loaded",
        got=f"{type(error).__name__}: {first_line}",
        allowed="a causal language model in Hugging Face format",
        fix=fix,
    )


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's architecture and of evenly spaced values of every parameter.

    It is taken from the model in memory, so that it also tells apart models that were changed after loading; it reads
    64 values per parameter, whatever the model's size. A sharded model has the fingerprint of the whole one.

    Args:
        model: any module, on any device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        with whole(parameter) as values:
            if values.is_meta:  # of a process that gets its weights when the model is sharded
                continue
            flat = values.reshape(-1)
            count = min(SAMPLED_VALUES, flat.numel())
            # in integers: float32 cannot count the entries of a large embedding, and would point past its end
            positions = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
            digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
            digest.update(flat[positions].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that turns text into tokens: vocabulary, rules, end token and chat template.

    Args:
        tokenizer: fast or slow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint([rules, tokenizer.eos_token, tokenizer.chat_template])
