"""python -m evaluate.read --layer 17 --run name --text "...": which latents fire on your own text, and what they do.

`Reader` and what it returns are those of evaluate/reader.py. Of one layer, or several side by side; with --set, --scale
and --ablate also the model with the activations of some latents changed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parser, read, run_stage
from common.errors import InputError
from common.files import text_slug, write_whole
from common.settings import Settings
from evaluate.prompt.asked import HOWS, Asked, of_layers, parse

if TYPE_CHECKING:
    from evaluate.prompt.measure import Open, Place
    from evaluate.prompt.records import Prompt
    from evaluate.reader import Intervention, Reader, Sentence

__all__ = ["Intervention", "Reader", "Sentence"]


def __getattr__(name: str) -> Any:
    """`Reader` and what it returns, when they are first asked for: --help and a typo need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evaluate import reader

    return getattr(reader, name)


def text_of(text: str | None, file: str | None) -> str:
    """The text to be read: `text`, or the contents of `file`; "-" is standard input."""
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
        raise InputError(f"{file or repr(file)}: cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}") from error


def read_text(
    settings: Settings, text: str, asked: Sequence[Asked] = (), new_tokens: int | None = None
) -> tuple["Prompt", Path]:
    """Run the text through the runs of `settings.layers`; returns its record and the folder that it is written to.

    `asked`: changes of latents, each with its layer; `new_tokens`: length of the continuation that is generated.
    """
    from evaluate.prompt.change import measure_change, prepared
    from evaluate.prompt.measure import Text, measure_layers
    from evaluate.prompt.page import write_page
    from evaluate.prompt.records import VERSION, Prompt

    places = _places(settings)
    opened = _opener(settings)
    reader = opened(places[0])
    contexts = Text.of(text, reader)
    changes = prepared(asked, contexts, places, opened) if asked else None
    tokens, layers, skipped, evaluations = measure_layers(contexts, places, opened)
    changed = (
        {} if changes is None else {"intervention": measure_change(changes, contexts, reader, new_tokens)}
    )
    prompt = Prompt(
        version=VERSION,
        model=reader.source.model,
        text=text,
        effects_skipped=skipped,
        tokens=tokens,
        layers=layers,
        **changed,
    )
    base = settings.run_dir() if len(places) == 1 else settings.set_dir()
    of = " ".join(f"{each.how} {each.place}={each.value!r}" for each in asked)
    folder = base / "prompts" / text_slug(text, of)
    write_page(folder / "prompt.html", prompt, evaluations)
    # Without the line breaks of write_record, which double it: 5 kB for each token and layer.
    compact = json.dumps(prompt.written(), allow_nan=False, separators=(",", ":"))
    write_whole(folder / "prompt.json", (compact + "\n").encode())
    return prompt, folder


def _places(settings: Settings) -> list["Place"]:
    """Store and run of each layer, all there and of one model, before anything is computed."""
    from evaluate.prompt.measure import Place
    from evaluate.reader import same_model
    from evaluate.subject import run_of
    from shards import Store

    places = []
    for layer in settings.layers or (settings.layer,):
        own = settings.of_layer(layer)
        store = Store.of(own)
        places.append(Place(store, run_of(own, store)))
        same_model(places[0].source, store)
    return places


def _opener(settings: Settings) -> "Open":
    """Opens the readers, which share the language model; holds the transcoder of one at a time."""
    from evaluate.reader import Reader
    from evaluate.subject import checkpoint_note
    from transcoder import Transcoder

    model, mismatch = settings.model, settings.evaluate.allow_mismatch
    open_now: list[Reader] = []
    noted: set[int] = set()

    def opened(place: "Place") -> Reader:
        if open_now and open_now[0].store is place.store:
            return open_now[0]
        if open_now:
            del open_now[0].transcoder  # before the next one is read
        transcoder, layer = Transcoder.load(place.run_dir), place.source.layer
        if (at := transcoder.metadata.get("checkpoint")) and layer not in noted:
            noted.add(layer)
            print(checkpoint_note(settings.of_layer(layer).run_dir(), at["step"], at["of"]))
        if open_now:
            open_now[0] = open_now[0].beside(place.store, transcoder, mismatch)
        else:
            open_now.append(Reader(place.store, transcoder, model.device, model.name, mismatch))
        return open_now[0]

    return opened


def main() -> None:
    options = parser(
        "evaluate.read",
        "Show which latents fire on each token of a text and how they affect the next one, as a table and a page.",
    )
    options.add_argument("--text", help="the text, a sentence or more")
    options.add_argument("--file", help="a file of UTF-8 text, in place of --text; -: standard input")
    options.add_argument(
        "--set", help="set activations of latents: layer/latent[@token]=value, such as 12/345=3.0"
    )
    options.add_argument("--scale", help="multiply activations of latents, such as 12/345@5=2")
    options.add_argument("--ablate", help='set activations of latents to 0, such as "12/345 20/17@5"')
    options.add_argument(
        "--new-tokens",
        metavar="N",
        help="length of the continuation, generated before and after the change [12]",
    )
    request = read(options)
    arguments = request.arguments
    text = text_of(arguments.text, arguments.file)
    asked: list[Asked] = []
    for how in HOWS:
        if (given := getattr(arguments, how)) is not None:
            asked += parse(how, given)
    new_tokens = _new_tokens(arguments.new_tokens, bool(asked))
    from common.terminal.table import console
    from evaluate.prompt.console import show
    from transcoder.weights import chosen_run, n_layers  # with torch, which --help need not wait for

    settings = request.settings(request.layers(n_layers))
    asked = of_layers(asked, settings.layers or (settings.layer,))
    settings = chosen_run(settings, arguments.run)
    prompt, folder = read_text(settings, text, asked, new_tokens)
    show(prompt, folder, console(markup=False, emoji=False))


def _new_tokens(text: str | None, changing: bool) -> int | None:
    if text is None:
        return None
    if not changing:
        raise InputError("--new-tokens: nothing is changed; give SET, SCALE or ABLATE too")
    if not text.isascii() or not text.isdigit():
        raise InputError(f"--new-tokens: expected a whole number from 0, found {text!r}")
    return int(text)


if __name__ == "__main__":
    run_stage(main)
