"""Which model a store or a run is of: its weights tell; the name that it was loaded by is for people."""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import InputError, shown
from common.files import sha256
from common.settings import Model

POINTER = b"version https://git-lfs"
INDEX = "model.safetensors.index.json"


def model_sha256(model: Model) -> str | None:
    """Digest of the weights in the directory or .gguf file that is asked for; None for a name."""
    path = Path(model.name)
    if path.is_dir():
        return directory_sha256(path)
    return file_sha256(path) if is_gguf(model.name) and path.is_file() else None


FREE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
}
"""Keys of a config.json that change no activation: the precision is a setting and part of the weights' digest."""
TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
"""What a tokenizer is made from where there is no tokenizer.json."""
DESCRIBING = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    *TOKENIZERS,
)
"""Files that `described_sha256` reads."""


def description_sha256(model: Model) -> str | None:
    """Digest of what a model directory says besides its weights; None for a name or a .gguf file."""
    return described_sha256(Path(model.name)) if Path(model.name).is_dir() else None


def described_sha256(directory: Path) -> str:
    """Digest of config.json and of what makes tokens, however they are spelt; not of what changes no activation.

    A file that is no JSON counts by its bytes: loading says what is wrong with it.
    """
    files = [directory / name for name in DESCRIBING if (directory / name).is_file()]
    return _description(directory, (tuple(files), _marks(files)))


@cache
def _description(directory: Path, _: Any) -> str:
    """See `described_sha256`; a tokenizer.json of 33 MB (Gemma's) takes seconds."""
    tokenizer = _json(directory / "tokenizer.json")
    if isinstance(tokenizer, dict):
        keys = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        tokenizer = {key: tokenizer.get(key) for key in keys}
    elif tokenizer is None:
        tokenizer = [_json(directory / name) for name in TOKENIZERS]
    special, older = _json(directory / "tokenizer_config.json"), _json(directory / "special_tokens_map.json")
    if isinstance(older, dict) and isinstance(special, dict | None):
        # transformers passes over the older file where the newer lists all tokens
        lists_all = special is not None and "added_tokens_decoder" in special
        special = special if lists_all else {**(special or {}), **older}
    if isinstance(special, dict):
        named = [special.get(key) for key in ("bos_token", "eos_token")]
        special = [token.get("content") if isinstance(token, dict) else token for token in named]
    said = [_used(_json(directory / "config.json")), tokenizer, special]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def chat_template_sha256(directory: Path) -> str | None:
    """Digest of the chat template that transformers reads from a model directory; None where it reads none.

    Files of templates have precedence over tokenizer_config.json; of several templates it is the one called default.
    """
    files = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    if (default := directory / "chat_template.jinja").is_file():
        files["default"] = default
    if files:
        return sha256(files["default"]) if "default" in files else None
    config = _json(directory / "tokenizer_config.json")
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def _json(path: Path) -> Any:
    """What a JSON file says, the digest of another file, None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return sha256(path)


def _used(config: Any) -> Any:
    """A configuration, and those in it (text_config), without the keys that change no activation."""
    if not isinstance(config, dict):
        return config
    return {key: _used(value) for key, value in config.items() if key not in FREE and value is not None}


def is_gguf(name: str) -> bool:
    """Whether this is the name of a .gguf file, in capitals or not."""
    return name.lower().endswith(".gguf") and not Path(name).is_dir()


def directory_sha256(directory: Path) -> str | None:
    """Digest of every tensor in a model directory by name, type, shape and bytes, however many files hold them.

    None where there is no such file.
    """
    files = weight_files(directory)
    try:
        marks = _marks(files)
    except FileNotFoundError as error:
        if Path(error.filename).is_symlink():
            raise InputError(
                f"{error.filename}: a link to a file that has gone; download the model again"
            ) from error
        raise InputError(f"{error.filename}: no such file, though {INDEX} names it") from error
    return _digest(tuple(files), marks) if files else None


def file_sha256(file: Path) -> str:
    """Digest of a large file's bytes; of a model in one file."""
    return _file_digest(file, _marks([file]))


def _marks(files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """What changes when a file does: as long as it stays, the file is read once."""
    stats = [path.stat() for path in files]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


@cache
def _file_digest(file: Path, _: Any) -> str:
    return sha256(file)


def weight_files(directory: Path) -> list[Path]:
    """The .safetensors files that transformers reads; others may lie beside them (Mistral's consolidated ones)."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    try:
        index = json.loads((directory / INDEX).read_bytes())
        return sorted({directory / Path(name).name for name in index["weight_map"].values()})
    except OSError:
        return sorted(directory.glob("*.safetensors"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / INDEX}: cannot be read: {error}") from error


@cache
def _digest(files: tuple[Path, ...], _: Any) -> str:
    """See `directory_sha256`; 1.3 s for 517 MB."""
    where = {name: (path, header) for path in files for name, header in tensors_of(path).items()}
    digest = hashlib.sha256()
    for name, (path, (dtype, shape, start, stop)) in sorted(where.items()):
        digest.update(f"{name} {dtype} {shape}".encode())
        if stop > start:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                digest.update(memoryview(mapped)[start:stop])
    return digest.hexdigest()


def refuse_pointer(path: Path) -> None:
    """Raise `InputError` for what `git clone` leaves of a large file where Git LFS is not installed."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise InputError(f"{path}: is a pointer of Git LFS, not the file; fetch it (git lfs pull)")


def tensors_of(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Name -> (type, shape, first byte, byte after the last) of each tensor; raises `InputError` for another file."""
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"its header would have {length:,} bytes")
            header = json.loads(file.read(length))
        return {
            name: (entry["dtype"], entry["shape"], *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a whole .safetensors file: {error}") from error


def differs(model: Model, source: Mapping[str, Any]) -> str | None:
    """In what a model is another one than that of `source` (a store's or a run's); None: the same.

    Where both have weights at hand these decide: a directory may be moved, renamed, or named another way. A name of
    the hub, or a directory that is not on this machine, is compared by name.
    """
    if (digest := source.get("model_sha256")) and (own := model_sha256(model)):
        if own == digest:
            return _described_otherwise(model, source)
        if source.get("model") == model.name:
            return f"the weights in {model.name}: there {shown(digest)}, now {shown(own)}"
        return (
            f"model: there {source.get('model')!r} with weights {shown(digest)}, "
            f"asked {model.name!r} with {shown(own)}"
        )
    names = [str(source.get("model")), model.name]
    if names[0] != names[1] and len({os.path.realpath(name) for name in names}) > 1:
        return f"model: there {names[0]!r}, asked {names[1]!r}"
    revisions = [source.get("revision"), model.revision]
    if revisions[0] != revisions[1] and not Path(model.name).exists():
        return f"model.revision: there {revisions[0]!r}, asked {revisions[1]!r}"
    return None


def _described_otherwise(model: Model, source: Mapping[str, Any]) -> str | None:
    """That the same weights have another config.json, tokenizer or chat template; None where they have not.

    The template is looked at for a text of chats alone. A store or run of before noted none of them.
    """
    if not Path(model.name).is_dir():
        return None
    directory = Path(model.name)
    for what, key, digest_of in (
        ("config.json or the tokenizer", "description_sha256", described_sha256),
        ("the chat template", "chat_template_sha256", chat_template_sha256),
    ):
        if (there := source.get(key)) is not None and there != (now := digest_of(directory)):
            return f"{what} in {model.name}: there {shown(there)}, now {shown(now) if now else 'none'}"
    return None
