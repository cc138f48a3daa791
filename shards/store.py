"""Store: what a stage or a notebook opens.

Shapes: n rows, d columns, C contexts, T tokens of a context.
"""

import functools
import html
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from common.errors import InputError, shown
from common.files import sha256
from common.identity import differs
from common.settings import Settings
from common.tokens import TokenText
from shards.commit import commit_of, rows_removed
from shards.layout import CHUNK_ROWS, Array, split_arrays
from shards.loader import Loader
from shards.manifest import NAMES, SPLITS, Manifest, read_manifest
from shards.reader import ChunkReader, Contexts, RemovedArray, open_array, read_lines
from shards.remote import CACHE, CACHE_BYTES, Files, files_of, is_url
from shards.storage import STORAGES
from shards.text.find import Found, find
from shards.text.tokens import RowTokens, tokens_at


class Store:
    """A complete activation store of one layer.

    `manifest` says what was harvested from what; `train` and `heldout` are the rows, split by document.
    """

    def __init__(self, files: Files, manifest: Manifest, splits: dict[str, "StoreSplit"]) -> None:
        self.path, self._files = files.root, files
        self.manifest = manifest
        self.train = splits["train"]
        self.heldout = splits["heldout"]

    @classmethod
    def open(cls, path: str | Path, cache: Path = CACHE, cache_bytes: int = CACHE_BYTES) -> "Store":
        """Check the commit, the metadata's digests and the manifest; activations are checked as they are read.

        `path` is a directory, or an s3://, gs:// or https:// address whose files are kept in `cache`, at most
        `cache_bytes` of them, while they are used. Raises `InputError` naming the file, what was expected and
        what was found.
        """
        files = files_of(path, cache, cache_bytes)
        root = files.root
        commit = commit_of(root)
        for name, expected in commit.there.items():
            if name.endswith(".json"):
                _check_digest(files.local(name), expected)
        manifest = read_manifest(root)
        splits = {}
        # once, for both splits
        text = functools.cache(lambda: TokenText(read_tokenizer(files.local("tokenizer.json"))))
        for name in SPLITS:
            record = manifest.splits[name]
            arrays = split_arrays(manifest.source, name, record.rows, record.contexts)
            removed = any(array.file(0) in commit.removed for array in arrays.values())
            splits[name] = StoreSplit(files, arrays, manifest, text, removed)
        return cls(files, manifest, splits)

    @classmethod
    def of(cls, settings: Settings) -> "Store":
        """The store that a stage of these settings works on; raises what `open` and `check_asked` do."""
        store = cls.open(
            settings.store_path(settings.layer), settings.paths.cache, settings.paths.cache_bytes
        )
        store.check_asked(settings)
        return store

    def check_asked(self, settings: Settings) -> None:
        """Raise `InputError` when this store is of another layer, or of another model than the settings ask for.

        The store's directory is named after the last part of the model's name, which two models may share.
        """
        wanted, source = (settings.model, settings.layer), self.manifest.source
        differing = [f"layer: there {source.layer}, asked {wanted[1]}"] * (source.layer != wanted[1])
        if other_model := differs(wanted[0], source.model_dump(include={*NAMES})):
            differing.insert(0, other_model)
        if differing:
            raise InputError(
                f"{self.path}: is another store than the one asked for ({'; '.join(differing)}); harvest that one "
                "(make harvest), or give --model.name, --model.revision, --layer and HARVEST of this one"
            )

    @property
    def tokenizer_path(self) -> Path:
        """The store's own tokenizer.json; of a remote store in the cache, fetched again if it has gone from there."""
        return self._files.local("tokenizer.json")

    def find(
        self,
        pattern: str | re.Pattern[str],
        split: str = "heldout",
        group: int | str = 0,
        rows: int | None = None,
    ) -> Found:
        """`StoreSplit.find` in one split, by default the one that an evaluation reads."""
        return self.split(split).find(pattern, group, rows)

    def split(self, name: str) -> "StoreSplit":
        """The split of that name; `InputError` for any but train and heldout."""
        if name not in SPLITS:
            raise InputError(f"split: expected {' or '.join(SPLITS)}, found {shown(name)}")
        return getattr(self, name)

    def __repr__(self) -> str:
        source = self.manifest.source
        return (
            f"Store({str(self.path)!r}: {source.model} layer {source.layer}, {len(self.train):,} train and "
            f"{len(self.heldout):,} held-out rows, {source.d_in} -> {source.d_out}, {source.storage})"
        )

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"


def n_layers(settings: Settings) -> int:
    """How many layers the model has, as the store of any of them says: for LAYER=all.

    A store that is unfinished, damaged or of another model does not count; what is asked of its layer names it.
    Raises `InputError` where there is no other.
    """
    first = settings.store_path(0)
    if is_url(first):  # which cannot be listed
        return Store.open(first, settings.paths.cache, settings.paths.cache_bytes).manifest.source.n_layers
    folder = Path(first).parent
    for path in sorted(folder.glob("layer_*.zarr")):
        try:
            source = read_manifest(path).source
        except InputError:
            continue
        if not differs(settings.model, source.model_dump(include={*NAMES})):
            return source.n_layers
    raise InputError(
        f"layer: all: {folder} has no finished store of {settings.model.name}, which would say how many layers that "
        "has; harvest them (make harvest LAYER=all), or name them, LAYER=0-25"
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """A store's tokenizer.json; raises `InputError` when it is gone or damaged."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise InputError(f"{path}: not a readable tokenizer ({error}); harvest this store again") from error


def as_harvested(tokenizer: Tokenizer, special_tokens: str = "text") -> Tokenizer:
    """The tokenizer as a harvest uses it: a text gives all of its tokens and no others, the same every time.

    A tokenizer.json may cut and pad, and BPE may drop merges at random: settings of some training, not of the text.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = special_tokens == "text"
    return tokenizer


def _check_digest(path: Path, expected: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing, though files.sha256 lists it; make verify tells more")
    if (digest := sha256(path)) != expected:
        raise InputError(
            f"{path}: sha256 expected {shown(expected)}, found {shown(digest)}; make verify tells more"
        )


class StoreSplit:
    """The rows of one split in stored order: each window of 32,768 is shuffled, windows are in text order."""

    def __init__(
        self,
        files: Files,
        arrays: dict[str, Array],
        manifest: Manifest,
        text: Callable[[], TokenText],
        removed: bool = False,
    ) -> None:
        self.removed = removed
        """Whether its rows were removed after training; how many they were, their moments and their text are there."""
        self._where, self._text = files.where, text
        self.storage, self._stored_as = STORAGES[manifest.source.storage], manifest.source.storage
        self.d_in, self.d_out = manifest.source.d_in, manifest.source.d_out
        self.readers: dict[str, ChunkReader] = {
            name: RemovedArray(files, array) if removed and name != "contexts" else open_array(files, array)
            for name, array in arrays.items()
        }
        self.contexts = Contexts(self.readers["contexts"])

    def __len__(self) -> int:
        return self.readers["inputs"].array.shape[0]

    def __repr__(self) -> str:
        gone = " that were removed" if self.removed else ""
        return f"StoreSplit({len(self):,} rows{gone}, {self.d_in} -> {self.d_out}, {self._stored_as})"

    def refuse_removed(self) -> None:
        """Raise `InputError` where the rows were removed after training."""
        if self.removed:
            raise rows_removed(self._where)

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [start, stop) as (inputs [n, d_in], outputs [n, d_out]), float32, in stored order."""
        return self.inputs(start, stop), self._side("output", start, stop)

    def inputs(self, start: int, stop: int) -> torch.Tensor:
        """The inputs of rows [start, stop) alone, [n, d_in]: outputs are not decoded."""
        return self._side("input", start, stop)

    def provenance(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(context number uint32 [n], position in it uint16 [n]) of rows [start, stop)."""
        return self._read("row_context", start, stop), self._read("row_position", start, stop)

    @property
    def text(self) -> TokenText:
        """Token ids as text. The tokenizer is read when this is first asked for: a second or two if it is large."""
        return self._text()

    def tokens(self, start: int, stop: int) -> RowTokens:
        """The tokens of rows [start, stop), in stored order; `InputError` outside the split."""
        ids = tokens_at(self.contexts, *self.provenance(start, stop))
        return RowTokens(ids, [self.text.label(token) for token in ids.tolist()])

    def find(self, pattern: str | re.Pattern[str], group: int | str = 0, rows: int | None = None) -> Found:
        """The rows whose tokens overlap a match of the regular expression `pattern`, of the first `rows` rows (all).

        Each context is searched by itself, with special tokens spelled as their names: a match lies in one context, and
        in one document unless it includes the token that separates two. A character that is split over tokens belongs
        to all of them. Tokens without a row (BOS, say) may be part of a match, but add no row. `group`: the group whose
        tokens count. Raises `InputError` if `pattern` is not a regular expression, or has no such group.
        """
        if rows is not None and not 0 < rows <= len(self):
            raise InputError(f"rows: expected 1 to {len(self)}, those of the split, found {rows}")
        self.refuse_removed()
        return find(self, self.text, pattern, group, len(self) if rows is None else rows)

    def loader(
        self,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        batch: int = 0,
        epochs: int | None = 1,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> Loader:
        """Shuffled float32 batches on `device`, from batch number `batch` of `epoch`; see shards/loader.py."""
        self.refuse_removed()
        return Loader(self, batch_size, seed, epoch, batch, epochs, torch.device(device), rank, world)

    def _side(self, side: str, start: int, stop: int) -> torch.Tensor:
        stored = self._read(f"{side}s", start, stop)
        values = self.storage.widen(stored)
        if not self.storage.scaled:
            return torch.from_numpy(values)
        for chunk in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
            first, last = max(chunk * CHUNK_ROWS, start) - start, min((chunk + 1) * CHUNK_ROWS, stop) - start
            here = values[first:last]
            here *= self.readers[f"{side}_scales"].chunk(chunk)
            here *= self._read(f"{side}_row_scales", start + first, start + last)[:, None]
            if f"{side}_offsets" in self.readers:
                here += self.readers[f"{side}_offsets"].chunk(chunk)
        return torch.from_numpy(values)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"rows {start} to {stop}: expected 0 <= start <= stop <= {len(self)}")
        return read_lines(self.readers[name], range(start, stop))
