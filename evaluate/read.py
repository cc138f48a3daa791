"""python -m evaluate.read --layer 17 --run name --text "...": which latents fire on your own text.

`Reader` and what it returns are those of evaluate/reader.py. Of one layer, or several side by side.
"""

import hashlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.settings import Settings
from common.tokens import PART

if TYPE_CHECKING:
    from evaluate.prompt.records import Prompt
    from evaluate.reader import Intervention, Reader, Sentence

__all__ = ["Intervention", "Reader", "Sentence"]

SHOWN = 5
"""Latents listed for a token."""
TOKENS = 200
"""Tokens of the terminal's table; the page has all."""


def __getattr__(name: str) -> Any:
    """`Reader` and what it returns, when they are first asked for: --help and a typo need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evaluate import reader

    return getattr(reader, name)


def text_of(text: str | None, file: str | None) -> str:
    """What is to be read: `text`, or the contents of `file`; "-" is standard input."""
    if (text is None) == (file is None):
        raise InputError(
            "expected either TEXT=... (--text) or FILE=... (--file; - is standard input), found "
            + ("neither" if text is None else "both")
        )
    if file is None:
        assert text is not None
        return text
    try:
        if file == "-" and sys.stdin is None:  # closed before the program began
            raise InputError("-: standard input is closed")
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}") from error


def read_text(settings: Settings, text: str) -> tuple["Prompt", Path]:
    """The text through the runs of `settings.layers`, and the folder of its prompt.json and prompt.html."""
    from evaluate.files import write_record
    from evaluate.prompt.measure import measure_prompt
    from evaluate.prompt.page import write_page
    from evaluate.reader import Reader
    from evaluate.subject import checkpoint_note, run_of
    from shards import Store
    from transcoder import Transcoder

    readers, run_dirs = {}, {}
    model, mismatch = settings.model, settings.evaluate.allow_mismatch
    for layer in settings.layers or (settings.layer,):
        own = settings.of_layer(layer)
        store = Store.of(own)
        run_dirs[layer] = run_of(own, store)
        transcoder = Transcoder.load(run_dirs[layer])
        if at := transcoder.metadata.get("checkpoint"):
            print(checkpoint_note(own.run_dir(), at["step"], at["of"]))
        if readers:
            readers[layer] = next(iter(readers.values())).beside(store, transcoder, mismatch)
        else:
            readers[layer] = Reader(store, transcoder, model.device, model.name, mismatch)
    prompt = measure_prompt(text, readers, run_dirs)
    of_one = len(run_dirs) == 1
    folder = (settings.run_dir() if of_one else settings.set_dir()) / "prompts" / _slug(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / "prompt.html", prompt)
    write_record(folder / "prompt.json", prompt)
    return prompt, folder


def _slug(text: str) -> str:
    """A directory's name for a text: its first words, and a digest of all of it."""
    words = "-".join(re.findall(r"[a-z0-9]+", text.lower())[:6])[:40].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{words}-{digest}" if words else digest


def show(prompt: "Prompt", folder: Path, console: Console) -> None:
    """The strongest latents of each token, a table for each layer."""
    from evaluate.report.console import plain, table_of

    rows = [token for token in prompt.tokens if token.row]
    for layer in prompt.layers:
        title = f"layer {layer.layer}, run {layer.run}; strongest latents, up to {SHOWN}: number:activation"
        table = table_of(title, ("token", "error", "active", "strongest"))
        for number, token in enumerate(rows[:TOKENS]):
            active, share = layer.active[number], layer.error_share[-1][number]
            shown = "  ".join(f"{each.latent}:{each.value:.3g}" for each in active[:SHOWN])
            error = "-" if share is None else f"{share:.2f}"
            table.add_row(repr(token.text) if token.text else PART, error, str(len(active)), shown)
        console.print(table)
    if len(rows) > TOKENS:
        plain(console, f"the first {TOKENS} of {len(rows):,} tokens; the page has all")
    plain(console, f"page {folder / 'prompt.html'}")


def main() -> None:
    options = parser(
        "evaluate.read", "Show which latents fire on each token of a text, as a table and a page."
    )
    options.add_argument("--text", help="the text, a sentence or more")
    options.add_argument("--file", help="a file of UTF-8 text, in place of --text; -: standard input")
    asked = read(options)
    arguments = asked.arguments
    text = text_of(arguments.text, arguments.file)
    from transcoder.weights import chosen_run, n_layers  # with torch, which --help need not wait for

    settings = asked.settings(asked.layers(n_layers))
    settings = chosen_run(settings, arguments.run, every_layer=len(settings.layers) > 1)
    prompt, folder = read_text(settings, text)
    show(prompt, folder, Console(markup=False, emoji=False))


if __name__ == "__main__":
    run_stage(main)
