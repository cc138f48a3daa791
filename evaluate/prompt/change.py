"""A text with the activations of some latents changed: every token's prediction before and after.

Shapes: T tokens of a context, V words of the vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import InputError
from common.tokens import TokenText
from evaluate.prompt.asked import Asked
from evaluate.prompt.intervene import Change, Outcome, Site, intervene, site
from evaluate.prompt.measure import Open, Place, Text, short
from evaluate.prompt.next_token import following
from evaluate.prompt.records import Candidate, ChangedLatent, PromptChange, Shift
from evaluate.reader import Reader

LIKELIEST = 5
"""Tokens listed of the distributions before and after the change."""
WRITTEN = 12
"""Tokens that the model writes after the text, if no other number is asked for."""


class Changes(NamedTuple):
    """What was asked for, and the changes of each layer by the number of the row in the whole text."""

    asked: Sequence[Asked]
    sites: list[Site]
    row_of: list[int]
    """Number of each token's row in the whole text, -1 without one."""


def prepared(asked: Sequence[Asked], text: Text, places: Sequence[Place], opened: Open) -> Changes:
    """The changes asked for, checked against text and transcoders; raises `InputError` where one cannot be made."""
    reader = opened(places[0])
    kept = torch.cat([reader.rows_of(context) for context in text.contexts])
    row_of = torch.where(kept, kept.cumsum(0) - 1, -1).tolist()
    for each in asked:
        _check_token(each, text, row_of)
    sites = []
    for place in places:
        own = [each for each in asked if each.layer == place.source.layer]
        if own:
            changes = [
                Change(
                    each.latent,
                    each.how != "set",
                    each.value,
                    None if each.token is None else row_of[each.token],
                )
                for each in own
            ]
            coder = opened(place).transcoder
            for each in own:
                if each.latent >= coder.d_sae:
                    what = f"{each.how.upper()}: {each.place}"
                    raise InputError(f"{what}: layer {each.layer}'s run has latents 0 to {coder.d_sae - 1}")
            sites.append(site(place.source, coder, changes, f"layer {place.source.layer}: "))
    return Changes(asked, sites, row_of)


def _check_token(asked: Asked, text: Text, row_of: Sequence[int]) -> None:
    if asked.token is None:
        return
    what = f"{asked.how.upper()}: {asked.place}"
    if asked.token >= len(row_of):
        raise InputError(f"{what}: the text has tokens 0 to {len(row_of) - 1}, found {asked.token}")
    if row_of[asked.token] < 0:
        pieces = [piece for context in text.pieces for piece in context]
        raise InputError(
            f"{what}: token {asked.token}, {pieces[asked.token]!r}, gives no row: no transcoder reads it; give a token "
            "that the table lists"
        )


def measure_change(changes: Changes, text: Text, reader: Reader, new_tokens: int | None) -> PromptChange:
    """Every context of the text, and what the model writes after the last one; `new_tokens`: none for the default."""
    last = len(text.contexts) - 1
    room = (reader.model.positions or WRITTEN + len(text.contexts[last][0])) - len(text.contexts[last][0])
    written = min(WRITTEN, room) if new_tokens is None else new_tokens
    shifts: list[Shift] = []
    moved: dict[int, list[Tensor]] = {each.source.layer: [] for each in changes.sites}
    row, continuation = 0, ("", "")
    for number, context in enumerate(text.contexts):
        n_rows = int(reader.rows_of(context).sum())
        here = [
            own
            for each in changes.sites
            if (own := each._replace(changes=_within(each.changes, row, n_rows))).changes
        ]
        found = intervene(reader.model, context, here, written if number == last else 0)
        after = text.after(number, 0 if reader.source.bos_token_id is None else 1)
        shifts += _shifts(found, following(found.before, after).tokens, reader.token_text)
        for each in changes.sites:
            nothing = torch.zeros(n_rows, len(each.latents), device=reader.device)
            moved[each.source.layer].append(found.made.get(each.source.layer, nothing))
        before, then = (reader.tokenizer.decode(own, skip_special_tokens=False) for own in found.continuation)
        continuation = (before, then)
        row += n_rows
    whole = {layer: torch.cat(parts) for layer, parts in moved.items()}
    listed = [_listed(each, changes, whole) for each in changes.asked]
    return PromptChange(changes=listed, tokens=shifts, continuation=continuation)


def _within(changes: Sequence[Change], first: int, n: int) -> list[Change]:
    """Those of a context's n rows, from `first` of the whole text, with their numbers in the context."""
    return [
        each if each.row is None else each._replace(row=each.row - first)
        for each in changes
        if each.row is None or first <= each.row < first + n
    ]


def _listed(asked: Asked, changes: Changes, moved: dict[int, Tensor]) -> ChangedLatent:
    assert asked.layer is not None, "of_layers has given it"
    own = next(each for each in changes.sites if each.source.layer == asked.layer)
    column = moved[asked.layer][:, own.latents.index(asked.latent)]
    if asked.token is not None:
        column = column[changes.row_of[asked.token]][None]
    return ChangedLatent(
        layer=asked.layer,
        latent=asked.latent,
        how=asked.how,
        value=None if asked.how == "ablate" else asked.value,
        token=asked.token,
        rows=int((column != 0).sum()),
        largest=short(float(column[column.abs().argmax()])) if len(column) else 0.0,
    )


def _shifts(found: Outcome, then: Tensor, text: TokenText) -> list[Shift]:
    """Of each token of a context; `then` [T]: ids of the tokens that follow."""
    both = [logits.float() for logits in (found.before, found.after)]
    totals = [logits.logsumexp(-1).tolist() for logits in both]
    likeliest = [logits.topk(min(LIKELIEST, logits.shape[-1])).indices.tolist() for logits in both]

    def candidate(at: int, token: int) -> Candidate:
        before, after = (float(logits[at, token]) for logits in both)
        p, q = (
            torch.tensor(logit - total[at]).exp().item()
            for logit, total in zip((before, after), totals, strict=True)
        )
        return Candidate(
            token=text.label(token),
            logit=(short(before), short(after)),
            probability=(short(p), short(q)),
        )

    return [
        Shift(
            kl=short(max(0.0, kl)),  # rounding leaves -1e-9 where nothing changes
            next=candidate(at, token),
            likeliest=[candidate(at, each) for each in dict.fromkeys([*likeliest[0][at], *likeliest[1][at]])],
        )
        for at, (kl, token) in enumerate(zip(found.kl.tolist(), then.tolist(), strict=True))
    ]
