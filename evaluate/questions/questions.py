"""Which latents fire on X, what else they fire on, and what they write: questions about the rows of one split.

Shapes: n rows, F latents, T tokens of a context, D_out.
"""

from collections.abc import Iterable
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from common.device import pick_device
from common.errors import InputError, shown
from evaluate.questions.contexts import Context, Contexts
from evaluate.questions.firings import firings
from evaluate.questions.separation import separation
from shards import Store
from transcoder import Transcoder
from transcoder.gain import bind

if TYPE_CHECKING:
    from evaluate.reader import Reader

COLUMNS = ("f1", "precision", "recall", "auc", "firings", "hits")


class Questions:
    """A transcoder's firings on rows of a store, read once and held in memory, 8 bytes each.

    The transcoder is bound to the store (`transcoder.gain.bind`), `mismatch` as there. `split` "heldout" or "train";
    `rows`: how many of its first rows (default: all). Raises `InputError` if they have more firings than fit, or if the
    transcoder is of another layer or model than the store.
    """

    def __init__(
        self,
        store: Store,
        transcoder: Transcoder,
        split: str = "heldout",
        rows: int | None = None,
        device: str = "auto",
        mismatch: bool = False,
    ) -> None:
        own = store.split(split)
        if not (len(own) if rows is None else 0 < rows <= len(own)):
            raise InputError(f"rows: expected 1 to {len(own)}, those of split {split}, found {rows or 0}")
        own.refuse_removed()
        self.transcoder = bind(transcoder, store, mismatch=mismatch).to(pick_device(device))
        self.rows = len(own) if rows is None else rows
        self._store, self._split, self._name = store, own, f"{split} rows of {store.path}"
        self._firings = firings(self.transcoder, own, self.rows)
        self._context, self._position = own.provenance(0, self.rows)

    def __repr__(self) -> str:
        n, active = self.transcoder.d_sae, len(self._firings.rows) / self.rows
        return f"Questions({n:,} latents on {self.rows:,} {self._name}, {active:.1f} active on a row)"

    def latents_for(self, mask: Any, by: str = "f1") -> pd.DataFrame:
        """How well each latent separates the rows marked by `mask` [n] bool from the others; best first by column `by`.

        Indexed by latent, all F of them. `firings`: rows on which it fires; `hits`: marked ones among them; `precision`
        = hits / firings (NaN without a firing); `recall` = hits / marked rows; `f1` = their harmonic mean, 2 hits /
        (firings + marked rows); `auc`: probability that its activation is higher on a random marked row than on a
        random other one; a tie, also of two rows without a firing, counts half. Raises `InputError` for a mask of
        another length, or one that marks no row or all.
        """
        if by not in COLUMNS:
            raise InputError(f"by: expected one of {', '.join(COLUMNS)}, found {shown(by)}")
        marks = self._mask(mask)
        if not 0 < marks.sum() < self.rows:
            raise InputError(
                f"mask: expected some of the {self.rows:,} rows to be marked and others not, found "
                f"{int(marks.sum()):,} marked"
            )
        found = separation(self._firings, marks)
        table = pd.DataFrame({name: getattr(found, name) for name in COLUMNS})
        table.index.name = "latent"
        return table.sort_values(by, ascending=False, kind="stable")

    def contexts_of(self, latent: int, n: int = 10, reach: int = 16, mask: Any = None) -> Contexts:
        """The `n` contexts in which `latent` is strongest, with `reach` tokens either side of its strongest row there.

        They are read from the store, so every latent that fires has them. `mask` [n] bool: rows to choose from
        (default: all). Raises `InputError` for a latent that does not exist, or a mask of another length.
        """
        self._refuse_unknown([latent])
        if n < 1 or reach < 0:
            raise InputError(f"contexts: expected n from 1 and reach from 0, found {n} and {reach}")
        rows, values = self._firings.of(latent)
        found = Contexts(latent, len(rows), self.rows)
        strongest = np.argsort(-values, kind="stable")
        if mask is not None:
            strongest = strongest[self._mask(mask)[rows[strongest]]]
        context = self._context[rows]
        _, first = np.unique(context[strongest], return_index=True)
        for entry in strongest[np.sort(first)[:n]].tolist():
            here = np.flatnonzero(context == context[entry])
            acts = np.zeros(self._split.contexts.shape[1], np.float32)
            acts[self._position[rows[here]]] = values[here]
            found.append(self._around(int(rows[entry]), acts, reach))
        return found

    def writes(self, latents: Iterable[int], reader: "Reader", n: int = 10) -> pd.DataFrame:
        """Tokens whose logits each latent's decoder row alone raises and lowers most (`logit_effects`).

        Only tokens that occur in the store's text. A line for each (latent, "promoted" or "suppressed"): whether the
        latent is `like_random`, its effects no more peaked than a random direction's; then the `n` tokens, strongest
        first. `reader` has the store's language model. Raises `InputError` for a latent that does not exist, or a
        reader of another model.
        """
        from evaluate.labels.effects import logit_effects, tokens_of

        numbers, own = self._refuse_unknown(latents), self._store.manifest.source
        if reader.source.weights_sha256 != own.weights_sha256:
            raise InputError(
                f"reader: expected the model {own.model} of the store, found {reader.source.model}"
            )
        model = reader.model
        ranked = tokens_of(self._store, model.bridge.cfg.d_vocab)
        found = logit_effects(model, self.transcoder.W_dec[numbers].to(model.device), ranked, n)
        lines = {
            (latent, side): [alike, *map(self._split.text.label, tokens)]
            for latent, alike, *both in zip(
                numbers,
                found.like_random.tolist(),
                found.promoted.tolist(),
                found.suppressed.tolist(),
                strict=True,
            )
            for side, tokens in zip(("promoted", "suppressed"), both, strict=True)
        }
        index = pd.MultiIndex.from_tuples(list(lines), names=["latent", "tokens"])
        columns = ["like_random", *range(1, found.promoted.shape[1] + 1)]
        return pd.DataFrame(list(lines.values()), index, columns)

    def _around(self, row: int, acts: np.ndarray, reach: int) -> Context:
        """The stretch of text around a row; `acts` [T] of its context."""
        context, position = int(self._context[row]), int(self._position[row])
        pieces = self._split.text.pieces(self._split.contexts[context].tolist())
        near = slice(max(position - reach, 0), position + reach + 1)
        focus = position - near.start
        return Context(row, float(acts[position]), context, position, focus, pieces[near], acts[near])

    def _mask(self, mask: Any) -> np.ndarray:
        marks = np.asarray(mask)
        if marks.dtype != bool or marks.shape != (self.rows,):
            raise InputError(
                f"mask: expected bool [{self.rows}], one for each row (Found.mask, say), found {marks.dtype} "
                f"{list(marks.shape)}"
            )
        return marks

    def _refuse_unknown(self, latents: Iterable[int]) -> list[int]:
        numbers = [index(latent) for latent in latents]
        for latent in numbers:
            if not 0 <= latent < self.transcoder.d_sae:
                raise InputError(f"latent: expected 0 to {self.transcoder.d_sae - 1}, found {latent}")
        return numbers
