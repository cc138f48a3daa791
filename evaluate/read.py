"""python -m evaluate.read --layer 17 --run name --text "...": which latents fire on your own text.

`Reader`, `Sentence` and `Intervention` are those of evaluate/reader.py.
"""

from typing import TYPE_CHECKING, Any

from common.cli import load, parser, run_stage
from common.tokens import PART

if TYPE_CHECKING:
    from evaluate.reader import Intervention, Reader, Sentence

__all__ = ["Intervention", "Reader", "Sentence"]

SHOWN = 5
"""Latents listed for a token."""


def __getattr__(name: str) -> Any:
    """`Reader` and what it returns, when they are first asked for: --help and a typo need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evaluate import reader

    return getattr(reader, name)


def main() -> None:
    options = parser("evaluate.read", "Show which latents fire on your own text.")
    options.add_argument("--text", required=True, help="a sentence or more")
    settings, arguments = load(options)
    from rich.console import Console
    from rich.table import Table

    from evaluate.reader import Reader  # with torch, which --help need not wait for
    from evaluate.subject import checkpoint_note, run_of
    from shards import Store
    from transcoder import Transcoder
    from transcoder.weights import chosen_run

    settings = chosen_run(settings, arguments.run)
    store, model, mismatch = Store.of(settings), settings.model, settings.evaluate.allow_mismatch
    transcoder = Transcoder.load(run_of(settings, store))
    if at := transcoder.metadata.get("checkpoint"):
        print(checkpoint_note(settings.run_dir(), at["step"], at["of"]))
    sentence = Reader(store, transcoder, model.device, model.name, mismatch)(arguments.text)
    table = Table("token", "active", f"strongest latents, up to {SHOWN}: number:activation")
    for token, acts in zip(sentence.tokens, sentence.acts, strict=True):
        values, latents = acts.sort(descending=True)
        active = int((values > 0).sum())
        shown = zip(latents[: min(active, SHOWN)].tolist(), values.tolist(), strict=False)
        numbers = "  ".join(f"{latent}:{value:.3g}" for latent, value in shown)
        table.add_row(repr(token) if token else PART, str(active), numbers)
    Console(markup=False, emoji=False).print(table)
    if sentence.left_out:
        length = store.manifest.source.context_length
        print(f"the last {sentence.left_out} tokens were left out: contexts of this store have {length}")


if __name__ == "__main__":
    run_stage(main)
