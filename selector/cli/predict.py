"""`selector predict`: rank a huge pool without gradients, from the texts of the part that was scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from rich.table import Table

from selector.cli.command import console
from selector.cli.foreign import model_of, template_of
from selector.cli.scored import ScoredCommand
from selector.cli.select import SCORES
from selector.config import ScoreConfig, from_mapping, save_yaml
from selector.errors import ConfigError, SelectionError, StoreError
from selector.store.schema import CONFIG

if TYPE_CHECKING:
    from selector.store import FeatureStore
    from selector.types import Scores

BLOCK = 1 << 14
"""Rows whose words are held at a time."""
WEAK = 0.5
"""Rank correlation below which a prediction is said to be weak: it then explains a quarter of the variance of ranks."""


@dataclass(frozen=True, kw_only=True)
class PredictCommand(ScoredCommand):
    """Give every row of a huge pool a score without gradients, predicted from its words, once a random part is scored.

    Example: selector predict features/ --data pool.jsonl --out predicted/

    The pool holds the scored rows too: they keep their own scores, and a tenth of them judges the prediction. Nothing is
    written where it cannot be told from chance. Then: selector select predicted/scores.parquet --out selection/
    """

    name: ClassVar[str] = "predict"

    data: str
    """The pool; rows of it are in the store."""
    out: Path
    """Directory of scores.parquet."""
    split: str = "train"
    """Which split, where there are several."""
    id_column: str | None = None
    """Column with the sample ids; the one of the store when it is not given."""
    columns: tuple[str, ...] = ()
    """Which column holds what, likewise."""
    seed: int = 0
    """Chooses the rows that judge."""

    def run(self) -> int:
        from selector.scores import Distilled, HashedWords, write_scores

        if self.by == "n_tokens":
            raise ConfigError("length needs no prediction", got="--by n_tokens", allowed="a score of the gradients")
        store = self.opened()
        scores = self.scores()
        pool, texts = self._pool(store, scores)
        known = np.flatnonzero(np.isfinite(pool.values))
        model = Distilled.fit(HashedWords.of(texts(known)), pool.values[known], seed=self.seed)
        blocks = (np.arange(start, min(start + BLOCK, len(pool))) for start in range(0, len(pool), BLOCK))
        values = np.concatenate([np.zeros(0), *(model.predict(HashedWords.of(texts(rows))) for rows in blocks)])
        predicted = _with_lengths(pool, values)
        judgement = self._judge(pool, predicted, known[model.judged])
        missing = np.isnan(pool.values)
        filled = replace(
            pool,
            values=np.where(missing, predicted.values, pool.values),
            raw=np.where(missing, predicted.raw, pool.raw),
        )
        judgement |= {"from": len(known), "samples": int(np.isfinite(filled.values).sum()) - len(known)}
        about = {"without_score": int(np.isnan(filled.values).sum()), "predicted": {**judgement, "seed": self.seed}}
        self.out.mkdir(parents=True, exist_ok=True)
        write_scores(
            self.out / SCORES, {scores.provenance["by"]: replace(filled, provenance={**scores.provenance, **about})}
        )
        save_yaml(self.out / CONFIG, self.settings(), f"replay with: selector run {self.out}")
        console().print(f"{self.out / SCORES}: {judgement['from']:,} scores kept, {judgement['samples']:,} predicted")
        return 0

    def _pool(self, store: FeatureStore, scores: Scores) -> tuple[Scores, Callable[[np.ndarray], Iterator[str]]]:
        """The pool's rows with the scores that the store has of them, NaN elsewhere, and what reads texts of some of them."""
        from selector.data.ids import column_ids, content_hash, content_ids
        from selector.data.layout import recognize
        from selector.data.load import load_rows
        from selector.data.samples import Encoder
        from selector.scorer.models import load_tokenizer, tokenizer_fingerprint

        identity = store.manifest.identity
        config = from_mapping(ScoreConfig, store.manifest.command.get("config", {}), str(store.path))
        given = {"id_column": self.id_column or config.id_column, "columns": self.columns or config.columns}
        dataset = load_rows(self.data, self.split)
        layout = recognize(dataset.column_names, replace(config, **given))
        tokenizer = load_tokenizer(model_of(store), chat_template=template_of(store))
        if tokenizer_fingerprint(tokenizer) != identity["tokenizer"]:
            raise StoreError(
                "the tokenizer is not that of the store",
                got=model_of(store),
                fix="restore the one that was scored with",
            )
        if layout.id_column is not None:
            ids = column_ids(dataset[layout.id_column], layout.id_column)
        else:
            ids = content_ids(map(content_hash, layout.rows(dataset)))
        sources = dataset[layout.source_column] if layout.source_column else [""] * len(ids)
        sources = ["" if source is None else str(source) for source in sources]
        encoder = Encoder(tokenizer, identity["max_length"], config.truncation, layout.loss)
        counts = [
            (sample.n_tokens, sample.n_loss_tokens) if sample.status == "ok" else (0, 0)
            for sample in encoder.encode(layout.rows(dataset), ids, sources)
        ]
        n_tokens, n_loss_tokens = np.array(counts, dtype=np.int64).T
        position = dict(zip(scores.ids.tolist(), range(len(scores)), strict=True))
        known = np.array([position.get(name, -1) for name in ids])
        pool = replace(
            scores,
            ids=np.array(ids, dtype=object),
            rows=np.arange(len(ids)),
            source=np.array(sources, dtype=object),
            values=np.where(known >= 0, scores.values[known], np.nan),
            raw=np.where(known >= 0, scores.raw[known], np.nan),
            n_tokens=n_tokens,
            n_loss_tokens=n_loss_tokens,
        )
        return pool, lambda rows: (" ".join(words(row)) for row in layout.rows(dataset.select(rows)))

    def _judge(self, pool: Scores, predicted: Scores, judged: np.ndarray) -> dict[str, Any]:
        """Print how well held-out scores are predicted, beside what their lengths alone say; refuse what may be chance."""
        from selector.scores import spearman, spearman_interval

        table = Table(
            "score", "Spearman", "95 % interval", "tokens alone", title=f"prediction of {len(judged):,} held-out scores"
        )
        controlled = self.control != "none"
        names = {"raw": "raw", "values": "length-controlled (selected by)"} if controlled else {"values": "selected by"}
        rho, low, high = 0.0, 0.0, 0.0
        for column, name in names.items():
            own = getattr(pool, column)[judged]
            rho = spearman(getattr(predicted, column)[judged], own)
            low, high = spearman_interval(rho, len(judged))
            alone = spearman(pool.n_tokens[judged], own)
            table.add_row(name, f"{rho:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{alone:+.3f}")
        out = console()
        out.print(table)
        if not low > 0:
            raise SelectionError(
                "the words of a sample do not predict its score",
                got=f"rank correlation {rho:+.2f}, {low:+.2f} to {high:+.2f} with 95 % confidence",
                allowed="an interval above zero", fix="score more rows, or the whole pool with `selector score`",
            )  # fmt: skip
        if rho < WEAK:
            out.print(f"weak: below {WEAK} much of the best is missed; more scored rows may help")
        return {"held_out": len(judged), "spearman": rho, "interval": [low, high]}


def _with_lengths(pool: Scores, values: np.ndarray) -> Scores:
    """Predicted scores, and the raw ones that they stand for at each sample's length; NaN for rows without gradient."""
    from selector.scores import load_control

    values = np.where(pool.n_loss_tokens > 0, values, np.nan)
    control = load_control(pool.provenance["control"])
    uncontrolled = values if pool.provenance["higher_first"] else -values
    return replace(
        pool,
        values=values,
        raw=control.restore(uncontrolled, pool.n_tokens - pool.n_loss_tokens, pool.n_loss_tokens),
    )


def words(value: Any) -> Iterator[str]:
    """The texts in a row, whatever its layout: strings, and the contents of messages.

    Args:
        value: contents by role, or a part of them.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name != "role":
                yield from words(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from words(part)
