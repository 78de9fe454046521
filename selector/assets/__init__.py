"""What ships with the package so that the first command needs no network: a tiny model and real rows."""

from pathlib import Path

HERE = Path(__file__).parent

TINY_MODEL = HERE / "tiny"
"""A base model of 3.2 M parameters (6 layers of 192, vocabulary 4,096)."""

POOL = HERE / "pool.jsonl"
"""400 rows to select from, half GSM8K, half Dolly."""

HELD_OUT = HERE / "heldout.jsonl"
"""120 rows of the same sources, none of them in the pool."""
