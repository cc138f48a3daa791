"""A text in the terminal: a line for each token, in 80 columns; the page has all."""

from collections import Counter
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from common.numbers import number_or_dash
from common.tokens import PART, printable
from evaluate.prompt.records import ChangedLatent, Prompt, PromptChange, PromptLayer
from evaluate.report.console import plain, table_of
from evaluate.report.templates import number, percent, visible

SHOWN = 3
"""Latents listed for a token."""
TOKENS = 200
"""Tokens of a layer's table."""
NAMED = 5
"""Latents named below it."""
SHIFTED = 10
"""Tokens of the table of a change: those whose prediction it moves most."""
WIDE, STRONGEST = 10, 26
"""Columns of the terminal for a token, and for the strongest latents: the table then fits 80."""


def show(prompt: Prompt, folder: Path, console: Console) -> None:
    """A table for each layer, and of a change what it does to the predictions."""
    rows = [i for i, token in enumerate(prompt.tokens) if token.row]
    plain(
        console,
        "latents as number:activation; for the next: the largest direct effect on its logit",
    )
    for layer in prompt.layers:
        _layer(prompt, layer, rows[:TOKENS], console)
    if len(rows) > TOKENS:
        plain(console, f"the first {TOKENS} of {len(rows):,} tokens; the page has all")
    last = prompt.tokens[-1]
    plain(
        console,
        f"the likeliest token after the text: {_word(last.next)} ({_share(last.next_probability)})",
    )
    if prompt.effects_skipped is not None:
        plain(console, f"no direct effects: {prompt.effects_skipped}")
    if prompt.intervention is not None:
        _change(prompt, prompt.intervention, console)
    plain(console, f"page {folder / 'prompt.html'}")


def _layer(prompt: Prompt, layer: PromptLayer, shown: list[int], console: Console) -> None:
    columns = ("#", "token", "error", "L0", "strongest", "for the next")
    table = table_of(f"layer {layer.layer}, run {layer.run}", columns)
    for row, i in enumerate(shown):
        active = layer.active[row]
        best = max(active, key=lambda each: each.effect or 0.0, default=None)
        for_next = "-"
        if best is not None and best.effect is not None and best.effect > 0:
            for_next = f"{best.latent}:+{number(best.effect, 2)}"
        table.add_row(
            str(i),
            _word(prompt.tokens[i].text),
            number_or_dash(layer.error_share[-1][row], ".2f"),
            str(len(active)),
            _strongest([f"{each.latent}:{number(each.value)}" for each in active[:SHOWN]]),
            for_next,
        )
    console.print(table)
    for line in _names(layer, len(shown)):
        plain(console, line)


def _strongest(latents: list[str]) -> str:
    """As many as there is room for."""
    while len(" ".join(latents)) > STRONGEST:
        latents = latents[:-1]
    return " ".join(latents) or "-"


def _share(p: float) -> str:
    """A probability."""
    return "<0.1 %" if p < 5e-4 else f"{100 * p:.1f} %"


def _word(text: str) -> str:
    """A token in a column: white space visible, nothing that the terminal obeys; a dot for a part of a character."""
    shown = printable(visible(text)) or PART
    return shown if cell_len(shown) <= WIDE else set_cell_size(shown, WIDE - 1).rstrip() + "…"


def _names(layer: PromptLayer, rows: int) -> list[str]:
    """Group, density and label of the latents that are listed most often."""
    listed = Counter(each.latent for active in layer.active[:rows] for each in active[:SHOWN])
    lines, unknown = [], False
    for latent, _ in listed.most_common(NAMED):
        known = layer.latents[latent]
        if known.density is None:
            unknown = True
            if known.note:
                lines.append(f"  {latent:>6}  group {known.group}: {printable(known.note)}")
            continue
        words = " ".join(_word(each) for each in known.label[:4])
        if known.note:
            words = f"{printable(known.note)}; {words}"
        lines.append(f"  {latent:>6}  group {known.group}, {percent(known.density)} % of rows: {words}")
    if unknown:
        lines.append("no labels: this layer's run has no evaluation (make evaluate)")
    return lines


def _change(prompt: Prompt, change: PromptChange, console: Console) -> None:
    for each in change.changes:
        plain(console, _told(each))
    by_size = sorted(range(len(change.tokens)), key=lambda i: -change.tokens[i].kl)
    table = table_of(
        "the likeliest next token, before and after; KL in nats", ("#", "token", "KL", "before", "after")
    )
    for i in sorted({*by_size[:SHIFTED], len(change.tokens) - 1}):
        shift = change.tokens[i]
        likeliest = [max(shift.likeliest, key=lambda each, at=at: each.probability[at]) for at in (0, 1)]
        words = [f"{_word(each.token)} {_share(each.probability[at])}" for at, each in enumerate(likeliest)]
        table.add_row(str(i), _word(prompt.tokens[i].text), number(shift.kl), *words)
    console.print(table)
    table = table_of(
        f"after the last token, {len(change.tokens) - 1}",
        ("token", "logit before", "after", "probability", "after "),
    )
    for each in change.tokens[-1].likeliest:
        logits, shares = (
            [f"{logit:.2f}" for logit in each.logit],
            [_share(p) for p in each.probability],
        )
        table.add_row(_word(each.token), *logits, *shares)
    console.print(table)
    before, after = map(printable, change.continuation)
    if before or after:
        plain(console, f"before: …{before}")
        plain(console, f"after:  …{after}")


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
        came = "its activation is the same already, so this changes nothing"
    largest = f", by up to {each.largest:+.3g}" if each.rows else ""
    return f"{each.layer}/{each.latent} {what.get(each.how, 'ablated')} {where}; {came}{largest}"
