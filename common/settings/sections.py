"""Every setting with the values that it may take, a class for each section of pipeline.toml."""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

ROOT = Path(__file__).resolve().parents[2]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _exponents(cls, value: Any, info: ValidationInfo) -> Any:
        """1e6 on the command line is a whole number, as it is in pipeline.toml."""
        kind = str(cls.model_fields[info.field_name or ""].annotation)
        if "int" not in kind or "str" in kind:
            return value
        return [_exponent(each) for each in value] if isinstance(value, list) else _exponent(value)


def _exponent(value: Any) -> Any:
    return (
        float(value)
        if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,2}", value)
        else value
    )


def _public(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"expected a name or owner/name, as on the Hugging Face hub, found {name!r}")
    return name


class Model(Section):
    name: str = "google/gemma-2-2b"
    """Hugging Face name, a local directory, a .gguf file, or an embedded model (embedded/smollm2-135m)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); none: the default branch."""
    public_name: Annotated[str | None, AfterValidator(_public)] = None
    """What exports and make push call the model; none: its hub name, else the last part of its path."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and forward pass; auto: bfloat16 on GPUs that have it, float16 on others, float32 on CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU if there is one. Used by every stage."""


class Data(Section):
    dataset: str = "HuggingFaceFW/fineweb-edu"
    """Hugging Face dataset, or an embedded one (embedded/english); unused when data.files is given."""
    name: str | None = "sample-10BT"
    """Configuration (subset) of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Hub revision of the dataset."""
    text_column: str = "text"
    """Column that holds the text; meta.text: text of the object meta; one of chats goes through the chat template."""
    label_column: str | None = None
    """Column that holds a label of each text, for make probe; none: the texts have none."""
    files: tuple[str, ...] = ()
    """Local files, directories or patterns, in this order, instead of data.dataset; file types: docs/your_model.md."""
    special_tokens: Literal["text", "parse"] = "text"
    """How <eos> in a text is read: text: as characters; parse: as the token, which gives no row. Chats need parse."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """On a row without readable text: stop the harvest, or skip the row and count it."""
    pack: Literal["document", "concat"] = "document"
    """document: contexts from one document each, short documents and remainders dropped; concat: documents joined."""


class Harvest(Section):
    rows: int = Field(default=15_000_000, gt=0)
    """Train rows to harvest (one row is one token); held-out rows are additional."""
    context_length: int = Field(default=1024, ge=2, le=65_535)
    """Tokens per context, the beginning-of-sequence token included."""
    batch_size: int = Field(default=16, gt=0)
    """Contexts per forward pass."""
    input: Literal["normalized", "mlp_in"] = "normalized"
    """MLP input without (normalized) or with (mlp_in) the RMSNorm's gain."""
    storage: Literal["int8", "bfloat16", "float32"] = "int8"
    """How values are stored; int8 has row and column scales."""
    compressor: str = "auto"
    """zstd-N, blosc-zstd-N, blosc-lz4-N with -shuffle or -bitshuffle, or none; auto: the measured best."""
    max_quantisation_fvu: float = Field(default=1e-3, gt=0)
    """Harvest stops when storing costs a larger fraction of the variance than this."""
    max_dimension_fvu: float = Field(default=0.05, gt=0)
    """Harvest stops when storing costs a larger fraction of one dimension's own variance than this."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents that training never sees."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds the held-out split and the order of rows within a window."""
    keep: Literal["all", "layer"] = "all"
    """layer: harvest, train and evaluate some layers, remove their train rows, go on with others (docs/layers.md)."""
    disk_bytes: int | None = Field(default=None, gt=0)
    """With harvest.keep layer, what the stores may take together; none: what is free, but for a twentieth."""

    @property
    def expected_rows(self) -> int:
        """Train and held-out rows, as far as they are known before the text is read."""
        return round(self.rows / (1 - self.heldout_fraction))


def _whole(size: Any) -> Any:
    return int(size) if isinstance(size, str) and re.fullmatch(r"\d+", size) else size


Size = Annotated[int | str, BeforeValidator(_whole)]


class Transcoder(Section):
    d_sae: Size = "8x"
    """Number of latents; "8x" means eight times d_in."""
    group_sizes: tuple[Size, ...] = Field(default=("0.5x", "1x", "2x", "4.5x"), min_length=1)
    """Latents per nesting level, coarsest first; they sum to d_sae."""
    k: int = Field(default=96, gt=0)
    """Mean number of active latents per row in training."""
    selection: Literal["batch_topk", "topk"] = "batch_topk"
    """k*B largest activations of the whole batch, or k largest of each row."""
    skip: bool = False
    """Add a learned linear map from input to output."""

    @model_validator(mode="after")
    def _groups_sum_to_d_sae(self) -> "Transcoder":
        sizes = (self.d_sae, *self.group_sizes)
        if len({type(size) for size in sizes}) == 1:
            self.resolve(d_in=ANY_WIDTH)  # all plain or all multiples: checkable before d_in is known
        else:
            [_latents(size, ANY_WIDTH) for size in sizes]
        return self

    def resolve(self, d_in: int) -> tuple[int, tuple[int, ...]]:
        """(d_sae, group sizes) in latents for inputs of width `d_in`."""
        (d_sae,), groups = latents((self.d_sae,), d_in), latents(self.group_sizes, d_in)
        if sum(groups) != d_sae:
            raise ValueError(
                f"d_sae must be the sum of group_sizes: d_sae is {self.d_sae}, "
                f"group_sizes {', '.join(map(str, self.group_sizes))} do not sum to it; give both"
            )
        if self.k > d_sae:
            raise ValueError(f"k is {self.k}, but there are only {d_sae} latents; lower transcoder.k")
        return d_sae, groups


ANY_WIDTH = 10**6 * 720_720
"""In place of a d_in that is not known yet: every multiple of up to six decimals is a whole number of it."""


def latents(sizes: Sequence[int | str], d_in: int) -> tuple[int, ...]:
    """Sizes as numbers of latents; multiples like "4.5x" are of `d_in`."""
    return tuple(_latents(size, d_in) for size in sizes)


def _latents(size: int | str, d_in: int) -> int:
    if isinstance(size, int):
        latents = Fraction(size)
    elif re.fullmatch(r"\d+(\.\d+)?x", size):
        latents = Fraction(size[:-1]) * d_in  # exact: 0.7 * 640 is 447.99999999999994 as a float
    else:
        raise ValueError(f'size {size!r} is neither a whole number nor a multiple of d_in like "8x"')
    if latents <= 0:
        raise ValueError(f"size {size} is not a positive number of latents")
    if latents.denominator != 1:
        raise ValueError(f"size {size} of d_in {d_in} is {float(latents):g}, not a whole number of latents")
    return int(latents)


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


Rate = Annotated[float | None, BeforeValidator(_auto)]


class Train(Section):
    rows: int = Field(default=15_000_000, gt=0)
    """Rows to train on, in whole batches; more than the store holds means several epochs."""
    batch_size: int = Field(default=1024, gt=0)
    """Rows per step."""
    lr: Rate = Field(default=None, gt=0)
    """Peak learning rate of Adam; auto: the rule in docs/training.md."""
    min_lr: Rate = Field(default=None, ge=0)
    """Learning rate at the end of the cosine decay; auto: a hundredth of the peak."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of linear warm-up, at most half of the run."""
    precision: Literal["auto", "float32", "tfloat32", "bfloat16"] = "auto"
    """Inputs of the products; weights and sums are float32 always. auto: tfloat32 on a GPU with TF32, else float32."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Initialises the weights."""
    order_seed: int = Field(default=0, ge=0, lt=2**63)
    """Orders the rows."""
    init_from: str | None = None
    """Run directory whose weights this run starts from."""
    init_mismatch: bool = False
    """Allow train.init_from to be of a different layer, model or hook than the store."""
    aux_k: int = Field(default=512, ge=0)
    """Dead latents per row that reconstruct the residual; 0: no auxiliary loss."""
    aux_coefficient: float = Field(default=0.125, ge=0)
    """Weight of the auxiliary loss, relative to the residual's own size (see train/step/losses.py)."""
    dead_after_rows: int = Field(default=16_000, gt=0)
    """A latent that has not fired for this many rows is dead."""
    density_limit: float | None = Field(default=None, gt=0, lt=1)
    """Share of the rows on which a latent may fire; its bias is lowered above nine tenths of it. None: no limit."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Gradient norm above which gradients are scaled down; none: never."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between resumable checkpoints."""
    log_every: int = Field(default=50, gt=0)
    """Steps between logged metrics."""
    heldout_every: int = Field(default=500, gt=0)
    """Steps between measurements of the held-out FVU."""
    sample_every: int = Field(default=100, ge=0)
    """Steps between collections of activation samples; 0: none."""
    latent_shards: int = Field(default=1, gt=0)
    """Processes that share the latents. Those with the same latents share the rows (docs/scale.md)."""

    @model_validator(mode="after")
    def _possible(self) -> "Train":
        if self.lr is not None:
            self.rates(self.lr)  # else checkable only when the rule has given the peak
        if self.rows < self.batch_size:
            raise ValueError(f"rows {self.rows} are less than one batch of {self.batch_size}")
        return self

    def rates(self, auto: float) -> tuple[float, float]:
        """(peak, final) learning rate, where `auto` is the peak if lr is left to the rule."""
        lr = auto if self.lr is None else self.lr
        min_lr = lr / 100 if self.min_lr is None else self.min_lr
        if min_lr > lr:
            raise ValueError(f"min_lr {min_lr:g} is above lr {lr:g}; lower train.min_lr")
        return lr, min_lr


def _groups(sizes: Any) -> Any:
    """The command line's form of one dictionary's groups: 288/576/1152/2592."""
    return sizes.split("/") if isinstance(sizes, str) else sizes


class Sweep(Section):
    """Lists of values; a sweep trains every combination in one pass over the store.

    What decides the batches (rows, batch_size, order_seed, the harvest) is the same for all runs.
    """

    lr: tuple[float, ...] = ()
    """Peak learning rates."""
    warmup_steps: tuple[int, ...] = ()
    """Lengths of the warm-up."""
    seed: tuple[int, ...] = ()
    """Seeds of the first weights."""
    precision: tuple[str, ...] = ()
    """Precisions of the encoder product."""
    aux_k: tuple[int, ...] = ()
    """Dead latents per row in the auxiliary loss."""
    aux_coefficient: tuple[float, ...] = ()
    """Weights of the auxiliary loss."""
    dead_after_rows: tuple[int, ...] = ()
    """Rows without firing after which a latent is dead."""
    density_limit: tuple[float, ...] = ()
    """Limits of the share of rows on which a latent fires."""
    k: tuple[int, ...] = ()
    """Active latents per row."""
    d_sae: tuple[Size, ...] = ()
    """Dictionary sizes; the groups grow in proportion."""
    group_sizes: tuple[Annotated[tuple[Size, ...], BeforeValidator(_groups)], ...] = ()
    """Nestings, 288/576/1152/2592 on the command line; d_sae is their sum."""
    selection: tuple[str, ...] = ()
    """batch_topk, topk."""
    skip: tuple[bool, ...] = ()
    """Without and with the linear map."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "Sweep":
        if self.d_sae and self.group_sizes:
            raise ValueError("give d_sae or group_sizes, not both: each decides the other")
        return self


class Wandb(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """offline: writes into the run directory, needs no key; auto: WANDB_MODE, WANDB_DISABLED, or offline."""
    project: str | None = None
    """Project the runs are logged to; none: WANDB_PROJECT, or matryoshka-transcoder."""


class Evaluate(Section):
    rows: int | None = Field(default=None, gt=0)
    """Rows to evaluate; none: all of the split."""
    split: Literal["heldout", "train"] = "heldout"
    """Split to evaluate; training never sees heldout."""
    checkpoint: bool = False
    """Evaluate (or read with) the newest checkpoint of a run instead of its finished weights."""
    allow_mismatch: bool = False
    """Allow a store of a different layer, model or hook than the transcoder was trained on."""


def _place(value: Any) -> Any:
    """The name of a directory; ~ is the user's home, which a shell puts in place of it at a word's start alone."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("expected a directory, found an empty name")
    try:
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value
    except RuntimeError as error:
        raise ValueError(f"{value}: {error}") from error


def _directory(value: Any) -> Any:
    """As `_place`, of what lies on a disk only: an address would become a directory called s3:."""
    if isinstance(value, str) and re.match(ADDRESS_LIKE, value):
        raise ValueError(f"expected a directory, found {value!r}; a directory of this name is ./{value}")
    return _place(value)


def _directory_or_address(value: Any) -> Any:
    """As `_place`; what looks like an address is one that stores are read from, and no directory called S3:."""
    value = _place(value)
    if isinstance(value, str) and re.match(ADDRESS_LIKE, value) and not re.match(ADDRESS, value):
        raise ValueError(
            "expected a directory, or an address such as s3://bucket/folder or file:///folder (s3, gs, az, file, https "
            f"or hf, in small letters), found {value!r}; a directory of this name is ./{value}"
        )
    return value


ADDRESS_LIKE = r"(?i:[a-z][a-z0-9+.-]*:/|(?:s3|gs|az|file|https?|hf):)"
ADDRESS = r"(?:s3|gs|az|https?|hf)://[^/]|file://(?:localhost)?/+[^/]"


class Paths(Section):
    activations: Annotated[str, BeforeValidator(_directory_or_address)] = "activations"
    """Where stores live: a directory, or an s3://, gs://, az:// or file:// address; https:// and hf:// to read them."""
    checkpoints: Annotated[Path, BeforeValidator(_directory)] = Path("checkpoints")
    """Where runs live."""
    cache: Annotated[Path, BeforeValidator(_directory)] = ROOT / ".cache" / "stores"
    """Where files of remote stores are kept while they are used."""
    cache_bytes: int = Field(default=20_000_000_000, gt=0)
    """Size of that cache; an epoch of a larger store downloads it again."""
    scratch_bytes: int = Field(default=4_000_000_000, gt=0)
    """Room in its directory, for each process, of a harvest to an address: windows that wait for their upload."""

    @model_validator(mode="after")
    def _no_secrets(self) -> "Paths":
        if re.match(r"\w+://[^/]*@", self.activations):
            raise ValueError(
                "an address is written beside every artifact; give user and password another way"
            )
        return self
