"""What is evaluated: any transcoder, fed as a store's rows are."""

from pathlib import Path

from common.errors import InputError
from shards import Store
from transcoder import Transcoder
from transcoder.gain import convert


def read(path: str | Path, store: Store) -> Transcoder:
    """The transcoder at `path` (see `Transcoder.load`), converted to the store's input convention.

    Raises `InputError` naming the file, what was expected and what was found.
    """
    transcoder, source = Transcoder.load(path), store.manifest.source
    found = (transcoder.d_in, transcoder.d_out)
    if found != (source.d_in, source.d_out):
        raise InputError(
            f"{path}: expected widths {source.d_in} -> {source.d_out} as in {store.path}, "
            f"found {found[0]} -> {found[1]}"
        )
    return convert(transcoder, source.input, source.model_dump(), str(path))
