"""A text in the terminal: a line for each token, in 80 columns; the page has all."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.numbers import number_or_dash
from common.tokens import PART, printable
from evaluate.prompt.records import ChangedLatent, Prompt, PromptChange, PromptLayer
from evaluate.report.console import plain, table_of
from evaluate.report.templates import number, percent, visible

SHOWN = 3
"""Latents listed for a token."""
TOKENS = 200
"""Tokens of a layer's table."""
NAMED = 10
"""Latents named below it."""
SHIFTED = 10
"""Tokens of the table of a change: those whose prediction it moves most."""
WIDE = 10
"""Characters of a token in a column of them."""


def show(prompt: Prompt, folder: Path, console: Console) -> None:
    """A table for each layer, and of a change what it does to the predictions."""
    rows = [i for i, token in enumerate(prompt.tokens) if token.row]
    for layer in prompt.layers:
        console.print(_layer(prompt, layer, rows[:TOKENS]))
        for line in _names(layer, len(rows[:TOKENS])):
            plain(console, line)
    if len(rows) > TOKENS:
        plain(console, f"the first {TOKENS} of {len(rows):,} tokens; the page has all")
    if prompt.effects_skipped is not None:
        plain(console, f"no direct effects: {prompt.effects_skipped}")
    if prompt.intervention is not None:
        _change(prompt, prompt.intervention, console)
    plain(console, f"page {folder / 'prompt.html'}")


def _layer(prompt: Prompt, layer: PromptLayer, shown: list[int]) -> Table:
    title = (
        f"layer {layer.layer}, run {layer.run}\nlatents as number:activation; the one that raises the next token "
        "most as number:+logit"
    )
    table = _narrow(title, ("#", "token", "error", "active", "strongest", "for the next"), (1, 4, 5))
    for row, i in enumerate(shown):
        active, token = layer.active[row], prompt.tokens[i]
        for_next = max(active, key=lambda each: each.effect or 0.0, default=None)
        after = "-"
        if for_next is not None and for_next.effect is not None and for_next.effect > 0:
            after = f"{for_next.latent}:+{number(for_next.effect, 2)}"
            after += "" if token.next_given else f" {_word(token.next)}?"
        table.add_row(
            str(i),
            _word(token.text),
            number_or_dash(layer.error_share[-1][row], ".2f"),
            str(len(active)),
            " ".join(f"{each.latent}:{number(each.value)}" for each in active[:SHOWN]),
            after,
        )
    return table


def _narrow(title: str, columns: tuple[str, ...], left: tuple[int, ...]) -> Table:
    """A table whose lines are one line each: what does not fit is cut."""
    table = table_of(title, columns)
    for i, column in enumerate(table.columns):
        column.no_wrap, column.justify = True, "left" if i in left else "right"
    return table


def _word(text: str) -> str:
    """A token in a column: white space visible, nothing that the terminal obeys; a dot for a part of a character."""
    shown = printable(visible(text)) or PART
    return shown if len(shown) <= WIDE else shown[: WIDE - 1] + "…"


def _names(layer: PromptLayer, rows: int) -> list[str]:
    """Group, density and label of the latents that are listed most often."""
    listed = Counter(each.latent for active in layer.active[:rows] for each in active[:SHOWN])
    lines = []
    for latent, _ in listed.most_common(NAMED):
        known = layer.latents[latent]
        if known.density is None:
            return ["no labels: this layer's run has no evaluation (make evaluate)"]
        words = " ".join(_word(each) for each in known.label[:4])
        lines.append(f"  {latent:>6}  group {known.group}, {percent(known.density)} % of rows: {words}")
    return lines


def _change(prompt: Prompt, change: PromptChange, console: Console) -> None:
    for each in change.changes:
        plain(console, _told(each))
    by_size = sorted(range(len(change.tokens)), key=lambda i: -change.tokens[i].kl)
    shown = sorted({*by_size[:SHIFTED], len(change.tokens) - 1})
    table = _narrow(
        "what the model predicts after a token, before and after the change; KL in nats",
        ("#", "token", "KL", "likeliest before", "after", "the next one", "before", "after"),
        (1, 3, 4, 5),
    )
    for i in shown:
        shift = change.tokens[i]
        before, after = (
            max(shift.likeliest, key=lambda each, at=at: each.probability[at]).token for at in (0, 1)
        )
        p = [percent(each) + " %" for each in shift.next.probability]
        table.add_row(
            str(i),
            _word(prompt.tokens[i].text),
            number(shift.kl),
            _word(before),
            _word(after),
            _word(shift.next.token),
            *p,
        )
    console.print(table)
    _last(prompt, change, console)
    before, after = map(printable, change.continuation)
    if before or after:
        plain(console, f"before: …{before}")
        plain(console, f"after:  …{after}")


def _last(prompt: Prompt, change: PromptChange, console: Console) -> None:
    """The likeliest tokens after the text, with logits."""
    table = _narrow(
        f"after token {len(prompt.tokens) - 1}, the last",
        ("token", "logit before", "after", "probability before", "after"),
        (0,),
    )
    for each in change.tokens[-1].likeliest:
        table.add_row(
            _word(each.token),
            *(f"{logit:.2f}" for logit in each.logit),
            *(percent(p) + " %" for p in each.probability),
        )
    console.print(table)


def _told(each: ChangedLatent) -> str:
    """A change in words: what was asked for, and what it came to."""
    what = (
        {"set": f"set to {each.value:g}", "scale": f"multiplied by {each.value:g}"}
        if each.value is not None
        else {}
    )
    where = "at every token" if each.token is None else f"at token {each.token}"
    came = (
        f"its activation changes at {each.rows} of them" if each.token is None else "its activation changes"
    )
    if not each.rows:
        came = "its activation there is the same already: this changes nothing"
    largest = f", by up to {each.largest:+.3g}" if each.rows else ""
    return f"{each.layer}/{each.latent} {what.get(each.how, 'ablated')} {where}; {came}{largest}"
