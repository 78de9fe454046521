"""Settings of a scoring run: one frozen dataclass, whose attribute docstrings are the help of the command line.

Every field is one of two kinds. An *identity* field changes the numbers, so a store that was begun with one value is
never continued with another. An *execution* field changes only how the work is done and may differ between runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import arg

from selector.errors import ConfigError, SelectorError, did_you_mean, raise_all

Precision = Literal["auto", "fast", "high", "reference"]
Truncation = Literal["error", "truncate-prompt", "truncate-completion", "skip"]
Format = Literal["auto", "rollouts", "rollout", "preference", "prompt-completion", "instruction", "messages", "text"]
LossName = Literal["auto", "response", "chosen", "rejected", "dpo", "policy-gradient"]
Normalizer = Literal["dapo", "grpo", "dr_grpo"]
Unit = Literal["group", "rollout"]
Adapter = Literal["weight", "lora-pro", "raw"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

ROLES = (
    "prompt", "completion", "instruction", "input", "output", "messages", "text", "tools", "chat_template_kwargs",
    "chosen", "rejected", "reference_chosen", "reference_rejected", "completions", "advantages", "advantage",
)  # fmt: skip
"""What a column can hold; the left-hand sides that `ScoreConfig.columns` accepts."""


def _identity(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"identity": True})


def _execution(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"identity": False})


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How samples are read, batched and measured."""

    # on the command line `--with`, which no field of Python can be called
    scorers: Annotated[tuple[str, ...], arg(name="with")] = _identity(("spectra",))
    """What to measure: the gradients' spectra, or scores for which forward passes suffice: loss (kept in any case), ifd,
    hidden_effective_rank, angle_concentration, logit_nuclear_norm; without spectra no backward pass is run."""
    format: Format = _identity("auto")
    """Layout of the rows; auto recognizes it by the column names."""
    columns: tuple[str, ...] = _identity(())
    """Which column holds what, as role=column: prompt=question completion=answer."""
    id_column: str | None = _identity(None)
    """Column with unique sample ids; without one, ids are content hashes with an occurrence number."""
    source_column: str | None = _identity(None)
    """Column that names each row's data set or mixture component; `source` is used when it exists."""
    loss: LossName = _identity("auto")
    """What a sample's gradient is of: the response's mean cross-entropy, the same of one side of a preference pair
    (chosen, rejected), the pair's DPO loss, or a group of rollouts' policy-gradient loss; auto goes by the columns."""
    beta: float = _identity(0.1)
    """Strength of the DPO loss's tie to the reference model."""
    normalizer: Normalizer = _identity("dapo")
    """What divides a policy-gradient loss: dapo all tokens of the group, grpo each rollout's own tokens and then the
    number of rollouts, dr_grpo the number of rollouts times the maximum length."""
    unit: Unit = _identity("group")
    """What a sample is where rows hold several rollouts: the whole group, or each rollout by itself."""
    max_length: int = _identity(4096)
    """Longest sequence in tokens; the model's own maximum when that is smaller."""
    truncation: Truncation = _identity("error")
    """What to do with longer samples: stop, cut the prompt's start, cut the completion's end, or skip with a status."""
    projections: tuple[str, ...] = _identity(())
    """Which projections of each layer to measure; all that the model has when empty."""
    layers: tuple[int, ...] = _identity(())
    """Which decoder layers to measure, negative counts from the end; all when empty."""
    layer_names: tuple[str, ...] = _identity(())
    """Roles of layers that are not known by name, as role=pattern: o=*.attn.attention_output."""
    adapter: Adapter = _identity("weight")
    """Gradient to measure under LoRA: of the full weight, of the update that the adapter makes, or of its own matrices."""
    precision: Precision = _identity("auto")
    """How exactly spectra are computed; auto is fast for bfloat16 and float16 models, high for float32 ones."""
    dtype: Dtype = _identity("auto")
    """Number format of the model; auto is float32 on CPU and the checkpoint's own on GPUs."""

    sketch_dimension: int = _identity(0)
    """Numbers per layer and projection of a random sketch of each gradient, a square such as 16; none when 0."""

    limit: int | None = _execution(None)
    """Score only the first so many rows; a later run with a larger limit adds the rest."""
    append: bool = _execution(False)
    """Score rows that were added at the end of the data set since the store was begun, too."""
    tokens_per_batch: int | None = _execution(None)
    """Budget of tokens, padding included, of one forward and backward pass; found from the device's memory when none."""
    padding_free: bool = _execution(False)
    """Join sequences instead of padding them; pays with flash attention."""
    checkpoint: bool = _execution(False)
    """Recompute each decoder layer in the backward pass: less memory, a third more time; for long sequences."""
    shard_rows: int = _execution(512)
    """Samples per shard file of the store; a crash loses at most the shards not yet written."""
    max_failed: float = _execution(0.01)
    """Largest share of samples without a score; above it the command ends with exit code 3."""

    def __post_init__(self) -> None:
        problems: list[SelectorError] = []
        for name in ("max_length", "tokens_per_batch", "shard_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(ConfigError(f"{name} is too small", got=getattr(self, name), allowed="1 or more"))
        if self.limit is not None and self.limit < 1:
            problems.append(ConfigError("limit is too small", got=self.limit, allowed="1 or more, or none"))
        if self.sketch_dimension < 0 or math.isqrt(self.sketch_dimension) ** 2 != self.sketch_dimension:
            problems.append(
                ConfigError(
                    "sketch_dimension is no square", got=self.sketch_dimension, allowed="0, 1, 4, 9, 16, 64, 256"
                )
            )
        if not self.scorers:
            problems.append(
                ConfigError("nothing is measured", got="no scorers", allowed="spectra, loss, ifd and others")
            )
        if self.sketch_dimension and "spectra" not in self.scorers:
            problems.append(
                ConfigError(
                    "sketch_dimension has no effect without spectra", got=self.sketch_dimension,
                    fix="add spectra to the scorers, or leave it out",
                )
            )  # fmt: skip
        if not 0 <= self.max_failed <= 1:
            problems.append(ConfigError("max_failed is no share", got=self.max_failed, allowed="0 to 1"))
        if not self.beta > 0:
            problems.append(ConfigError("beta is too small", got=self.beta, allowed="above 0"))
        for entry in self.columns:
            role, _, column = entry.partition("=")
            if role not in ROLES or not column:
                problems.append(
                    ConfigError(
                        "columns cannot be read",
                        got=entry,
                        allowed="role=column with role one of " + ", ".join(ROLES),
                        fix=did_you_mean(role, ROLES) or None,
                    )
                )
        raise_all(problems)

    def identity(self) -> dict[str, Any]:
        """Fields that change the numbers, as plain values for JSON and YAML."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.metadata["identity"]}

    def execution(self) -> dict[str, Any]:
        """Fields that change only how the work is done, as plain values for JSON and YAML."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if not f.metadata["identity"]}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def save_yaml(path: Path, values: Mapping[str, Any], comment: str = "") -> None:
    """Write settings as YAML that a person can read and `selector run` can replay.

    Args:
        path: the file, overwritten.
        values: plain values only.
        comment: first lines of the file, without the leading `#`.
    """
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    path.write_text(header + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader, which builds plain values only.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("the settings file cannot be read", got=error, fix="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no YAML that can be loaded safely",
            got=error,
            allowed="plain values",
            fix="remove tags that begin with !",
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds no settings", got=type(values).__name__, allowed="a mapping of names to values"
        )
    return values


T = typing.TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a config dataclass from plain values, checking every name and type.

    Args:
        cls: a dataclass, which may hold config dataclasses itself.
        values: plain values by field name.
        where: what is being read, for messages.

    Raises:
        ConfigError: an unknown name or a value of the wrong type; all of them at once.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    problems: list[SelectorError] = []
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            problems.append(
                ConfigError(f"{where}: unknown setting", got=name, allowed=", ".join(sorted(known)), fix=hint or None)
            )
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            arguments[name] = from_mapping(typing.cast(type, hints[name]), value, f"{where}: {name}")
        else:
            converted = tuple(value) if isinstance(value, list) else value
            if isinstance(value, str) and Path in (hints[name], *typing.get_args(hints[name])):
                converted = Path(value)
            if _fits(converted, hints[name]):
                arguments[name] = converted
            else:
                allowed = re.sub(r"typing\.|pathlib\.", "", str(getattr(hints[name], "__name__", hints[name])))
                problems.append(ConfigError(f"{where}: {name} has the wrong type", got=repr(value), allowed=allowed))
    raise_all(problems)
    return cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type that config dataclasses use."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
