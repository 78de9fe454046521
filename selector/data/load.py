"""Read the data set a user names: a file, a folder saved by `datasets`, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selector.errors import DataError

if TYPE_CHECKING:
    import datasets

READERS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def load_rows(data: str, split: str = "train") -> datasets.Dataset:
    """Load a data set as rows in a fixed order.

    Args:
        data: path of a JSONL, JSON, Parquet or CSV file (compressed or not), a folder that `Dataset.save_to_disk`
            wrote, or a data set's name on the hub.
        split: which split of a folder with several, or of a hub data set.

    Raises:
        DataError: nothing is there, it cannot be read, or it is empty.
    """
    import datasets

    path = Path(data)
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    kind = READERS.get(suffixes[-1].lower()) if suffixes else None
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(data)
        elif path.is_file():
            if kind is None:
                raise DataError(
                    f"{data} is of no known kind", got=path.suffix or "no suffix", allowed=", ".join(READERS)
                )
            options: dict[str, Any] = {"delimiter": "\t"} if ".tsv" in suffixes else {}
            loaded = datasets.load_dataset(kind, data_files=data, split="train", **options)
        elif kind is not None or path.is_absolute():
            raise DataError(f"there is no file {data}", fix="check the path")
        else:
            loaded = datasets.load_dataset(data, split=split)
    except DataError:
        raise
    except Exception as error:  # the readers raise many kinds, all of which mean the same to the user
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):
            raise DataError(f"{data} is empty", got="0 rows", allowed="1 row or more") from error
        raise DataError(
            f"{data} cannot be read", got=f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}",
            allowed="a JSONL, JSON, Parquet or CSV file, a folder saved by datasets, or a hub name",
            fix="check the path, the file's first lines, and the network for a hub name",
        ) from error  # fmt: skip
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(
                f"{data} has no split {split!r}", allowed=", ".join(map(str, loaded)), fix="name one with --split"
            )
        loaded = loaded[split]
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(
            f"{data} is a stream",
            got=type(loaded).__name__,
            allowed="a data set with a length",
            fix="download it first",
        )
    if len(loaded) == 0:
        raise DataError(f"{data} is empty", got="0 rows", allowed="1 row or more")
    return loaded
