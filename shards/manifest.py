"""What was harvested from what: the record inside every store."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from common.errors import InputError
from common.hooks import Convention
from shards.storage import STORAGES

FORMAT = "matryoshka-activations"
FORMAT_VERSION = 1
SPLITS = ("train", "heldout")


NAMES = frozenset({"model", "revision", "model_sha256", "description_sha256", "chat_template_sha256"})
"""Of a `Source`: what the model was called and lay in. Its weights' digest decides which one it is, and the contexts'
digests what its tokenizer and chat template made of the text."""
Vector = Annotated[list[float], Field(repr=False)]
"""One number per dimension; left out where a notebook shows a manifest."""


class Record(BaseModel):
    """A frozen part of a manifest; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _known_storage(name: str) -> str:
    if name not in STORAGES:
        raise ValueError(f"expected one of {', '.join(STORAGES)}")
    return name


class Source(Record):
    """What determines a store's content and is known before the model runs."""

    model: str
    revision: str | None
    weights_sha256: str
    """Digest of the model in memory: parameters and buffers by name, of `dtype`."""
    model_sha256: str | None = None
    """Digest of the model's files, by which another place of them is known (common/identity.py); None: older stores."""
    description_sha256: str | None = None
    """Digest of the model's config.json and tokenizer (common/identity.py); None: a .gguf file and older stores."""
    chat_template_sha256: str | None = None
    """Digest of the chat template that made texts of chats; None: no chat in the text, and older stores."""
    dtype: str
    """Of the model's weights and forward pass."""
    layer: int
    n_layers: int
    input: Convention
    input_hook: str
    """TransformerLens name of the harvested input."""
    output_hook: str
    """TransformerLens name of the harvested output, as it is added to the residual stream."""
    d_in: int
    d_out: int
    gain: Vector
    """[d_in] mlp_in = normalized * gain + gain_bias (Gemma's gain: 1 + weight)."""
    gain_bias: list[float] | None = Field(default=None, repr=False)
    """[d_in] of a LayerNorm (GPT-2), whose normalized rows are centred too; none: an RMSNorm, which adds nothing."""
    dataset: str
    dataset_name: str | None
    dataset_revision: str | None
    dataset_split: str | None
    text_column: str
    files: list[str] | dict[str, str]
    """sha256 of each local file, in the order of reading, twice if read twice. Once it was file name -> sha256."""
    special_tokens: Literal["text", "parse"] = "text"
    """What a special token's name in a text became: its characters, or the token."""
    pack: Literal["document", "concat"]
    context_length: int
    bos_token_id: int | None
    separator_token_id: int | None
    dropped_token_ids: list[int]
    """Positions that hold one of these tokens gave no row; neither did the first of a context."""
    heldout_fraction: float
    rows: int
    """Train rows asked for."""
    seed: int
    storage: Annotated[str, AfterValidator(_known_storage)]
    input_compressor: str
    output_compressor: str
    shard_rows: int
    chunk_rows: int
    offsets: bool = False
    """Whether an int8 store has column offsets, and rows scaled by columns weighed alike; not before 2026-11-26."""
    versions: dict[str, str]
    """Packages that decide the content."""

    @property
    def fingerprint(self) -> str:
        """sha256 of all of it but names: two harvests with one fingerprint ask for the same rows."""
        return digest(self.model_dump(exclude=set(NAMES)))


class Moments(Record):
    """Per-dimension moments of an array before it was quantised, in float64."""

    mean: Vector
    second_moment: Vector
    quantisation_fvu: float
    """Squared error of storing over squared deviations from the mean."""
    worst_dimension: int | None = None
    """Where storing costs the largest share of a dimension's own variance; None in stores before 2026-11-26."""
    worst_dimension_fvu: float | None = None
    """That share: what a dimension that is small beside the others loses does not show in quantisation_fvu."""

    @property
    def cost(self) -> str:
        """What storing cost, in words: of all the variance, and of the worst dimension's own."""
        worst = self.worst_dimension_fvu
        return f"{self.quantisation_fvu:.1e}" + (
            f" (worst dimension {worst:.1e})" if worst is not None else ""
        )

    @property
    def scale(self) -> float:
        """sqrt(E ||v||^2 / D): dividing by it gives values of unit mean square."""
        return float(np.sqrt(np.mean(self.second_moment)))

    @property
    def variance(self) -> np.ndarray:
        """[D] variance per dimension, float64."""
        return np.maximum(np.subtract(self.second_moment, np.square(self.mean)), 0.0)


class Split(Record):
    """What one split holds; moments are over its rows."""

    rows: int
    contexts: int
    contexts_sha256: str
    inputs: Moments | None
    """None for an empty split."""
    outputs: Moments | None


class Manifest(Record):
    """The record of a complete store, kept in the attributes of its zarr.json."""

    format: Literal["matryoshka-activations"] = FORMAT
    format_version: int = FORMAT_VERSION
    source: Source
    fingerprint: str
    tokenizer_sha256: str
    bad_rows: int = 0
    """Rows of the text that were skipped (data.on_bad_row)."""
    splits: dict[str, Split]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `from_json` takes them."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "Manifest":
        """Read a record found at `where`; raises `InputError` naming another version, or the key that is wrong."""
        version = values.get("format_version")
        if values.get("format") != FORMAT or version != FORMAT_VERSION:
            raise InputError(
                f"{where}: expected format {FORMAT} version {FORMAT_VERSION}, "
                f"found {values.get('format')} version {version}; harvest it again or use the version that wrote it"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"{where}: manifest key {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error


def read_manifest(root: Path) -> Manifest:
    """The manifest of the store at `root`; raises `InputError` when it is of another format or damaged."""
    path = root / "zarr.json"
    try:
        attributes = json.loads(path.read_bytes())["attributes"]
        manifest = dict(attributes.get("manifest", {}))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read: {why}") from error
    return Manifest.from_json(manifest, str(path))


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
