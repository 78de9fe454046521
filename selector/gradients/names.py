"""What a linear layer is for, by the names that model families use, and how fused layers divide into their parts.

The last part of a path decides together with its parent: `attn.c_proj` is an attention output, `mlp.c_proj` a down projection,
`linear_attn.out_proj` neither. A fused layer is split only for families whose layout is known, since one name stands for several
layouts; of any other family it is measured as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from selector.gradients.layers import Columns, consecutive
from selector.types import PROJECTIONS

ATTENTION_PARENTS = {"self_attn", "attn", "attention", "self_attention"}
MLP_PARENTS = {"mlp", "ffn", "feed_forward", "block_sparse_moe", "moe", "shared_expert", "shared_experts", "shared_mlp"}

ATTENTION_NAMES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "dense": "o", "c_proj": "o",
    "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv",
    "q_a_proj": "q_a", "q_b_proj": "q", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv",
}  # fmt: skip
MLP_NAMES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "c_fc": "up", "fc1": "up", "fc_in": "up", "dense_h_to_4h": "up",
    "c_proj": "down", "fc2": "down", "fc_out": "down", "dense_4h_to_h": "down",
}  # fmt: skip

ROLES = (*PROJECTIONS, "qkv", "kv", "gate_up", "expert_gate", "expert_up", "expert_down", "q_a", "kv_a")
"""Every role that a name can give, in the order of the layer table. Low-rank queries, keys and values (`q_a`, `kv_a`) have a second
matrix that produces q, or k and v. Routed experts have roles of their own: their numbers are means over several matrices."""

ROLE = re.compile(r"[a-z][a-z0-9_]*")
"""What a role may look like that a user gives."""


def role_of(path: str) -> str | None:
    """Role of a linear layer, or None when its name says nothing.

    Args:
        path: path within the decoder layer, such as `self_attn.q_proj`.
    """
    *parents, name = path.split(".")
    if not parents:
        roles = {names[name] for names in (ATTENTION_NAMES, MLP_NAMES) if name in names}
        return roles.pop() if len(roles) == 1 else None
    if ATTENTION_PARENTS.intersection(parents):
        return ATTENTION_NAMES.get(name)
    if MLP_PARENTS.intersection(parents) and "experts" not in parents:
        return MLP_NAMES.get(name)
    return None


def _heads_of_three(config: Any, outputs: int) -> dict[str, Columns]:
    size = outputs // config.num_attention_heads // 3
    return consecutive(config.num_attention_heads, q=size, k=size, v=size)


def _falcon(config: Any, outputs: int) -> dict[str, Columns]:
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        queries = heads // config.num_kv_heads
        size = outputs // config.num_kv_heads // (queries + 2)
        return consecutive(config.num_kv_heads, q=queries * size, k=size, v=size)
    if config.multi_query:
        size = outputs // (heads + 2)
        return consecutive(1, q=heads * size, k=size, v=size)
    return _heads_of_three(config, outputs)


def _grouped_query(config: Any, outputs: int) -> dict[str, Columns]:
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = outputs // (heads + 2 * shared)
    return consecutive(1, q=heads * size, k=shared * size, v=shared * size)


def _thirds(config: Any, outputs: int) -> dict[str, Columns]:
    return consecutive(1, q=outputs // 3, k=outputs // 3, v=outputs // 3)


def _halves(config: Any, outputs: int) -> dict[str, Columns]:
    return consecutive(1, gate=outputs // 2, up=outputs // 2)


def _latent(config: Any, outputs: int) -> dict[str, Columns]:
    return consecutive(config.num_attention_heads, k=config.qk_nope_head_dim, v=config.v_head_dim)


FUSED: dict[str, dict[str, Callable[[Any, int], dict[str, Columns]]]] = {
    "qkv": {
        "gpt_neox": _heads_of_three,
        "bloom": _heads_of_three,
        "falcon": _falcon,
        "phi3": _grouped_query,
        "gpt2": _thirds,
    },
    "gate_up": {"phi3": _halves, "glm4": _halves},
    "kv": {"deepseek_v3": _latent},
}
"""Layout of fused layers by role and the config's `model_type`."""


def parts_of(role: str, config: Any, outputs: int) -> dict[str, Columns | None]:
    """The parts that a layer is measured in, by role: several for a fused layer of a known layout, else the layer itself.

    Args:
        role: of the whole layer.
        config: text configuration of the model, which may be anything for a model that is not from transformers.
        outputs: number of outputs of the layer.
    """
    layout = FUSED.get(role, {}).get(getattr(config, "model_type", ""))
    return {role: None} if layout is None else dict(layout(config, outputs))
