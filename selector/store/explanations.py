"""`explanations.parquet`: the side table of a store that says which tokens make the gradient of a few chosen samples.

    sample_id       string
    tokens          list<string>          what each token adds to the text; sequences of a sample one after the other
    loss_mask       list<bool>            tokens that are predicted in the loss
    contribution    list<float32>         root mean square over the measured matrices of ‖x_t‖ ‖δ_t‖, the norm of the token's
                                          part of the gradient; in the gradient's unit, loss per weight
    spectra         list<list<float32>>   singular values over the layer table, descending, down to where they are noise;
                                          null where a matrix was not explained

The Parquet metadata carries the store's fingerprint. The table is written anew when samples are added; nothing but reports
reads it, and a store is whole without it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from selector.errors import StoreError
from selector.store.schema import METADATA_KEY
from selector.store.writer import write_atomically

EXPLANATIONS = "explanations.parquet"

SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("loss_mask", pa.list_(pa.bool_())),
        pa.field("contribution", pa.list_(pa.float32())),
        pa.field("spectra", pa.list_(pa.list_(pa.float32()))),
    ]
)


def read_explanations(store: Path, fingerprint: str) -> pa.Table:
    """Read the side table of a store.

    Args:
        store: the store's directory.
        fingerprint: of the store's manifest.

    Returns:
        The table; without rows when no sample was explained.

    Raises:
        StoreError: the table is damaged or belongs to another store.
    """
    path = store / EXPLANATIONS
    if not path.is_file():
        return SCHEMA.empty_table()
    remedy = "remove it, and explain again with `selector score ... --explain SAMPLE_ID`"
    try:
        table = pq.read_table(path)
        owner = json.loads((table.schema.metadata or {})[METADATA_KEY])["store"]
        found = table.replace_schema_metadata(None).cast(SCHEMA)
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise StoreError(f"{path} cannot be read", got=repr(error), fix=remedy) from error
    if owner != fingerprint:
        raise StoreError(f"{path} belongs to another store", got=owner, allowed=fingerprint, fix=remedy)
    return found


def add_explanations(store: Path, fingerprint: str, added: pa.Table) -> None:
    """Add samples to the side table of a store; those that it holds already are replaced.

    Args:
        store: the store's directory.
        fingerprint: of the store's manifest.
        added: rows of `SCHEMA`.

    Raises:
        StoreError: the table that is there is damaged or belongs to another store.
    """
    known = read_explanations(store, fingerprint)
    replaced = set(added["sample_id"].to_pylist())
    kept = known.filter(
        pa.array([sample_id not in replaced for sample_id in known["sample_id"].to_pylist()], pa.bool_())
    )
    table = pa.concat_tables([kept, added.cast(SCHEMA)])
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({METADATA_KEY: json.dumps({"store": fingerprint})}), sink, compression="zstd"
    )
    write_atomically(store / EXPLANATIONS, sink.getvalue().to_pybytes())
