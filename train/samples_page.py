"""python -m train.samples_page --layer 17 --run name [--latents 5,17]: the activation samples of a run.

The file, activation_samples/samples.jsonl, has one `Line` per latent; train/activation_samples.py writes it at the end.
"""

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from common.cli import load, parser, run_stage
from common.errors import InputError
from common.settings import first_mistake
from common.tokens import PART, printable

AROUND = 16
"""Tokens shown before and after."""
SHOWN = 20
"""Latents printed when none is asked for."""
RENDERED = 500
"""Latents in the page, evenly over the dictionary: the report of evaluate/ has all of them."""


class Text(TypedDict):
    """A token, and what stands up to `AROUND` tokens before and after it.

    A character that is split over tokens stands at the one that completes it, as in the report; the others are "".
    """

    before: str
    token: str
    after: str


class Sample(Text):
    """A row on which a latent was strong."""

    value: float
    """The raw activation, as it was when the row was seen."""
    row: int
    """Number in the store's train split."""
    context: int
    position: int


class Line(TypedDict):
    """A latent and the rows on which it was strongest."""

    latent: int
    group: int
    samples: list[Sample]
    """Strongest first."""


LINE = TypeAdapter(Line)


def read(run_dir: Path) -> Iterator[Line]:
    """The lines of samples.jsonl; raises `InputError` when it is not there, naming a line that is no such line."""
    file = run_dir / "activation_samples" / "samples.jsonl"
    if not file.is_file():
        from train import record

        if stands := record.stopped(run_dir):
            raise InputError(
                f"{run_dir}: {stands}; its samples are written when it ends (the same make train)"
            )
        raise InputError(f"{file}: no samples; train with train.sample_every above 0")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield LINE.validate_json(line)
            except ValidationError as error:
                raise InputError(
                    f"{file}: line {number} is damaged ({first_mistake(error)}); train the run again"
                ) from error


def render(latents: Iterable[Line]) -> str:
    """One self-contained page; text of the web is escaped, and no script may run."""
    parts = [PAGE]
    for latent in latents:
        parts.append(f"<h2>latent {latent['latent']} <small>group {latent['group']}</small></h2>")
        for sample in latent["samples"]:
            before, after = html.escape(sample["before"]), html.escape(sample["after"])
            token = html.escape(sample["token"] or PART)
            place = f"context {sample['context']}, position {sample['position']}"
            parts.append(
                f'<p title="{place}"><b>{sample["value"]:.3g}</b> {before}<mark>{token}</mark>{after}</p>'
            )
        if not latent["samples"]:
            parts.append("<p>never active when looked at</p>")
    return "\n".join(parts) + "\n"


PAGE = """<!doctype html><meta charset="utf-8"><title>Activation samples</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem } small { font-weight: normal; opacity: .7 }
p { margin: .15rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
b { font-variant-numeric: tabular-nums }
</style>
<h1>Activation samples</h1>"""


def numbers(words: Sequence[str]) -> list[int]:
    """The latents that were asked for, in that order, each once: numbers apart by commas, spaces or both."""
    parts = [part for word in words for part in word.replace(",", " ").split()]
    for part in parts or words:
        if not re.fullmatch(r"-?\d+", part):
            raise InputError(f"latents: {part!r}: expected numbers, for example --latents 56,12")
    return [*dict.fromkeys(map(int, parts))]


def print_latents(latents: Iterable[Line]) -> None:
    """A table for each latent, or that it was never active."""
    from common.terminal.table import Table, console

    for line in latents:
        title = f"latent {line['latent']} (group {line['group']})"
        if not line["samples"]:
            print(f"{title}\n  never active when looked at")
            continue
        table = Table("activation", "[[token]] in its text", title=title)
        for sample in line["samples"]:
            text = f"{sample['before']}[[{sample['token'] or PART}]]{sample['after']}"
            table.add_row(f"{sample['value']:.3f}", printable(text))
        console().print(table)


def main() -> None:
    options = parser("train.samples_page", "Print and render the activation samples of a run.")
    options.add_argument(
        "--latents",
        nargs="+",
        default=[],
        metavar="N",
        help="which to show, 5,17 or 5 17; otherwise a selection",
    )
    settings, arguments = load(options)
    from transcoder import weights  # with torch, which --help need not wait for

    settings = weights.chosen_run(settings, arguments.run, every_layer=False)
    run_dir, requested = settings.run_dir(), numbers(arguments.latents)
    weights.refuse_another_model(run_dir, settings)
    total = sum(1 for _ in read(run_dir))
    wanted = requested or [*range(0, total, max(1, total // RENDERED))]
    if beyond := [latent for latent in wanted if not 0 <= latent < total]:
        raise InputError(f"latents: {beyond[0]}: expected numbers from 0, below {total}")
    lines = {line["latent"]: line for line in read(run_dir) if line["latent"] in set(wanted)}
    chosen = [lines[latent] for latent in wanted]
    file = run_dir / "activation_samples" / "samples.html"
    file.write_text(render(chosen), encoding="utf-8")
    shown = (line for line in chosen if requested or line["samples"])
    print_latents(islice(shown, None if requested else SHOWN))
    print(f"\n{len(chosen):,} of {total:,} latents in {file}")


if __name__ == "__main__":
    run_stage(main)
