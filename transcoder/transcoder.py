"""The transcoder (Dunefsky et al. 2024, arXiv:2406.11944): its parameters, encode, decode, prefixes.

Its latents are nested as in Matryoshka SAEs (Bussmann et al. 2025, arXiv:2503.17547).
Shapes: n rows, D_in, D_out, F latents, G groups; prefix g is latents [0, prefix_ends[g]).
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.errors import InputError
from transcoder import formats, weights
from transcoder.entries import Entries, decode, entries_above, joined, largest_of_rows, reselected
from transcoder.tensor_files import blocks

OF_LATENTS = ("W_enc", "b_enc", "W_dec")
"""The parameters that have a row for each latent."""
LATENTS = 1 << 16
"""Of `slices`: pre-activations of at most so many latents at once, 0.27 GB for 1,024 rows."""
ROWS_PER_BLOCK = (
    4096  # of __call__: bounds the dense activations to 0.3 GB at 18,432 latents, 1.1 GB above 65,536
)


@dataclass(frozen=True, eq=False)
class Parameters:
    """The tensors that training changes: on normalised activations during training, on raw ones in a saved file."""

    W_enc: Float[Tensor, "F D_in"]
    b_enc: Float[Tensor, " F"]
    W_dec: Float[Tensor, "F D_out"]
    """Its rows have unit norm, in training and in a saved file."""
    b_dec: Float[Tensor, " D_out"]
    W_skip: Float[Tensor, "D_out D_in"] | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, without W_skip if there is none."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def of(self, latents: slice) -> "Parameters":
        """The parameters of these latents alone; b_dec and W_skip belong to all. Nothing is copied."""
        own = {name: getattr(self, name)[latents] for name in OF_LATENTS}
        return replace(self, **own)

    def map(self, change: Any) -> "Parameters":
        """These parameters with `change` applied to every tensor."""
        return Parameters(**{name: change(tensor) for name, tensor in self.named().items()})


@dataclass(frozen=True, eq=False, repr=False)
class Transcoder:
    """A trained transcoder from raw MLP inputs to raw MLP outputs.

    acts = relu(pre) * (pre > threshold),  pre = inputs W_enc^T + b_enc
    output = acts W_dec + b_dec (+ inputs W_skip^T)

    Inputs and activations have any leading shape, [n, D_in], [batch, tokens, D_in] or [D_in], and any floating dtype;
    what comes back has the same leading shape, in the weights' float32.
    The threshold is JumpReLU's (Rajamanoharan et al. 2024, arXiv:2407.14435), calibrated after training.
    """

    parameters: Parameters
    thresholds: Float[Tensor, " G *F"]
    """[G], one for each prefix; the last is the transcoder's. [G, F] if each latent has a threshold, as in other
    tools' transcoders."""
    prefix_ends: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Settings, harvest fingerprint, versions and training record of the run that made it."""
    k: int | None = None
    """In each row only the `k` largest are active (Gao et al. 2024, arXiv:2406.04093), a prefix counting its own
    latents; none of ours: other tools' top-k transcoders, whose thresholds are zero."""

    W_enc = property(lambda self: self.parameters.W_enc)
    b_enc = property(lambda self: self.parameters.b_enc)
    W_dec = property(lambda self: self.parameters.W_dec)
    b_dec = property(lambda self: self.parameters.b_dec)
    W_skip = property(lambda self: self.parameters.W_skip)

    @property
    def threshold(self) -> float | Float[Tensor, " F"]:
        """The threshold of the whole transcoder: one number, or [F] if each latent has one."""
        own = self.thresholds[-1]
        return own if own.ndim else float(own)

    @property
    def d_in(self) -> int:
        """Width of an input."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of an output."""
        return self.W_dec.shape[1]

    def __repr__(self) -> str:
        return (
            f"Transcoder({self.d_in} -> {self.d_out}, {self.d_sae:,} latents in prefixes "
            f"{'/'.join(map(str, self.prefix_ends))}, {self._gate()}, on {self.W_enc.device})"
        )

    def _gate(self) -> str:
        return f"top {self.k} of each row" if self.k else f"threshold {_span(self.thresholds[-1])}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{g}</td><td>{end:,}</td><td>{_span(threshold)}</td></tr>"
            for g, (end, threshold) in enumerate(zip(self.prefix_ends, self.thresholds, strict=True))
        )
        head = "<tr><th>prefix</th><th>latents</th><th>threshold</th></tr>"
        return f"<code>{html.escape(repr(self))}</code><table>{head}{rows}</table>"

    def pre_activations(self, inputs: Float[Tensor, "*b D_in"]) -> Float[Tensor, "*b F"]:
        """inputs W_enc^T + b_enc, before any threshold. Raises `InputError` for another width or for no floats."""
        pre = torch.addmm(self.b_enc, self._rows("inputs", inputs, self.d_in), self.W_enc.T)
        return pre.view(*inputs.shape[:-1], self.d_sae)

    def encode(self, inputs: Float[Tensor, "*b D_in"]) -> Float[Tensor, "*b F"]:
        """Activations: the pre-activation where it is positive and above the threshold, zero elsewhere.

        With `k`, only the k largest of each row. Raises `InputError` for inputs of another width or no floats.
        """
        pre = largest_of_rows(self.pre_activations(inputs).view(-1, self.d_sae), self.k)
        return pre.mul_(pre > self.thresholds[-1].clamp_min(0)).view(*inputs.shape[:-1], self.d_sae)

    def entries(self, pre: Float[Tensor, "n F"], g: int = -1) -> Entries:
        """The active entries of prefix `g` among all latents' pre-activations; of the whole transcoder by default."""
        end, threshold = self.prefix_ends[g], self.thresholds[g]
        return entries_above(pre[:, :end], threshold[:end] if threshold.ndim else threshold, self.k)

    def slices(
        self, inputs: Float[Tensor, "n D_in"], end: int | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "n w"]]]:
        """The pre-activations of the first `end` latents (of all), `LATENTS` of them at a time; raises as
        `pre_activations` does. Of a dictionary on disk each part of W_enc is read once.
        """
        end = self.d_sae if end is None else end
        rows = self._rows("inputs", inputs, self.d_in)
        for start in range(0, end, LATENTS):
            own = slice(start, min(start + LATENTS, end))
            yield own, torch.addmm(self.b_enc[own], rows, self.W_enc[own].T)

    def active(self, inputs: Float[Tensor, "n D_in"], g: int = -1) -> Entries:
        """The active entries of prefix `g`, as `entries` of the pre-activations, which need not all be in memory."""
        found = [self.part(pre, own, g) for own, pre in self.slices(inputs, self.prefix_ends[g])]
        return self.whole(found)

    def part(self, pre: Float[Tensor, "n w"], own: slice, g: int) -> tuple[int, Entries]:
        """What `whole` needs of one of the `slices`, whose latents are `own`: the entries of prefix `g` in it."""
        end, threshold = max(0, self.prefix_ends[g] - own.start), self.thresholds[g]
        inside = pre[:, :end]
        mine = threshold[own][:end] if threshold.ndim else threshold
        return own.start, entries_above(inside, mine, self.k)

    def whole(self, parts: Sequence[tuple[int, Entries]]) -> Entries:
        """The entries of all slices; with `k`, the k largest of each row."""
        if self.k is None or len(parts) == 1:
            return joined(parts)
        return reselected(joined(parts), lambda matrix: entries_above(matrix, 0.0, self.k))

    def base_output(self, inputs: Float[Tensor, "*b D_in"]) -> Float[Tensor, "*b D_out"]:
        """The output with no latent active: b_dec (+ inputs W_skip^T)."""
        rows = self._rows("inputs", inputs, self.d_in)
        if self.W_skip is None:
            return self.b_dec.expand(*inputs.shape[:-1], -1)
        return torch.addmm(self.b_dec, rows, self.W_skip.T).view(*inputs.shape[:-1], self.d_out)

    def decode(self, acts: Float[Tensor, "*b F"]) -> Float[Tensor, "*b D_out"]:
        """acts W_dec + b_dec. Without the skip connection, which needs the inputs: call the transcoder for that.

        Raises `InputError` for activations of another width or no floats.
        """
        outputs = torch.addmm(self.b_dec, self._rows("acts", acts, self.d_sae), self.W_dec)
        return outputs.view(*acts.shape[:-1], self.d_out)

    def __call__(self, inputs: Float[Tensor, "*b D_in"]) -> Float[Tensor, "*b D_out"]:
        """The MLP's outputs as reconstructed from its raw inputs, skip connection included.

        Raises `InputError` for inputs of another width or no floats.
        """
        rows = self._rows("inputs", inputs, self.d_in)
        outputs = torch.cat([self._outputs(block) for block in rows.split(ROWS_PER_BLOCK)])
        return outputs.view(*inputs.shape[:-1], self.d_out)

    def _outputs(self, inputs: Float[Tensor, "n D_in"]) -> Float[Tensor, "n D_out"]:
        return decode(self.active(inputs), self.W_dec, self.base_output(inputs))

    def _rows(self, what: str, values: Tensor, width: int) -> Float[Tensor, "n D"]:
        """Any leading shape as rows, in the weights' dtype; raises `InputError` for another width or for no floats."""
        if not values.ndim or values.shape[-1] != width or not values.is_floating_point():
            kind = str(values.dtype).removeprefix("torch.")
            raise InputError(f"{what}: expected floats [..., {width}], found {kind} {list(values.shape)}")
        return values.reshape(-1, width).to(self.W_enc.dtype)

    def prefix(self, g: int) -> "Transcoder":
        """Prefix `g` as a complete, narrower transcoder with its own threshold; -1 is the last.

        Raises `InputError` when there is no such prefix.
        """
        n = len(self.prefix_ends)
        if not -n <= g < n:
            raise InputError(f"prefix: expected 0 to {n - 1}, found {g}")
        g %= n
        end, whole = self.prefix_ends[g], self.parameters
        narrow = replace(whole, W_enc=whole.W_enc[:end], b_enc=whole.b_enc[:end], W_dec=whole.W_dec[:end])
        thresholds = self.thresholds[: g + 1]
        own = thresholds if thresholds.ndim == 1 else thresholds[:, :end]
        return replace(self, parameters=narrow, thresholds=own, prefix_ends=self.prefix_ends[: g + 1])

    def to(self, device: str | torch.device) -> "Transcoder":
        """This transcoder on another device."""
        moved = self.parameters.map(lambda tensor: tensor.to(device))
        return replace(self, parameters=moved, thresholds=self.thresholds.to(device))

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by name, metadata): all that a file of any format contains."""
        tensors = {**self.parameters.named(), "thresholds": self.thresholds}
        metadata = {**self.metadata, "prefix_ends": self.prefix_ends}
        if self.k is None:
            return tensors, metadata
        if not self.thresholds.any():  # what gates by thresholds alone then refuses the file
            del tensors["thresholds"]
        return tensors, {**metadata, "selection": "topk", "k": self.k}

    def save(self, path: str | Path) -> None:
        """Write to `path` if it ends in .safetensors, else to transcoder.safetensors in that directory."""
        weights.write(Path(path), *self.saved())

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", latents: slice | None = None
    ) -> "Transcoder":
        """Read a run directory or .safetensors file of ours, or a file or directory of SAELens, Gemma Scope (1 and 2),
        circuit-tracer or sparsify (transcoder/formats/); each also at hf://owner/name[@revision]/path.

        On the CPU its tensors are maps of a .safetensors file: a dictionary may be larger than the memory.
        `latents`: of slice(a, b) only latents a to b - 1, whose rows alone are read. Prefix g is then those of them
        that lie in prefix g of the whole, perhaps none. Each slice has all of b_dec and W_skip, which are added once
        where the outputs of several are added up.
        Raises `InputError` that names the file, the tensor, what was expected and what was found.
        """
        path = formats.fetched(path)
        tensors, metadata = formats.read(path)
        ends = metadata.pop("prefix_ends", None)
        if not _rising(ends):
            raise InputError(f"{path}: prefix_ends: expected rising numbers of latents, found {ends!r}")
        ends, k = tuple(ends), _k_of(path, metadata)
        if k is not None:
            tensors.setdefault("thresholds", torch.zeros(len(ends)))
        shapes = _shapes(path, tensors, ends)
        checked = {
            name: weights.check_shape(path, name, tensors.get(name), shape) for name, shape in shapes.items()
        }
        if latents is not None:
            checked, ends = _sliced(checked, ends, latents)
        placed = {name: tensor.to(device).contiguous() for name, tensor in checked.items()}
        for name, tensor in placed.items():
            if not all(bool(rows.isfinite().all()) for rows in blocks(tensor)):
                raise InputError(f"{path}: tensor {name}: expected finite numbers, found NaN or infinity")
        thresholds = placed.pop("thresholds")
        return cls(Parameters(**placed), thresholds, ends, metadata, k)


def _sliced(
    tensors: Mapping[str, Tensor], ends: tuple[int, ...], latents: slice
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """(tensors, prefix ends) of some latents, as views."""
    first, last, _ = latents.indices(ends[-1])
    own = {name: tensor[first:last] if name in OF_LATENTS else tensor for name, tensor in tensors.items()}
    if own["thresholds"].ndim == 2:
        own["thresholds"] = own["thresholds"][:, first:last]
    return own, tuple(min(max(end, first), last) - first for end in ends)


def _span(thresholds: Tensor) -> str:
    """One number if all are equal, otherwise the smallest and largest."""
    low, high = float(thresholds.min()), float(thresholds.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _rising(ends: Any) -> bool:
    """Whether these are positive whole numbers, each larger than the one before."""
    whole = isinstance(ends, list | tuple) and all(isinstance(end, int) for end in ends)
    return whole and bool(ends) and list(ends) == sorted(set(ends)) and ends[0] > 0


def _k_of(path: Path, metadata: dict[str, Any]) -> int | None:
    """What a file's metadata say of top-k, taken out of them; None where thresholds alone select."""
    selection, k = metadata.pop("selection", None), metadata.pop("k", None)
    if (selection, k) == (None, None):
        return None
    if selection != "topk" or type(k) is not int or k < 1:
        raise InputError(
            f"{path}: selection: expected 'topk' with a k of at least 1, found {selection!r:.80} with {k!r:.80}"
        )
    return k


def _shapes(path: Path, tensors: Mapping[str, Tensor], ends: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes that a file's tensors must have, given its prefix ends and the widths of W_enc and b_dec."""
    for name in ("W_enc", "b_dec"):
        if name not in tensors:
            raise InputError(
                f"{path}: tensor {name}: expected one, found {', '.join(sorted(tensors)) or 'none'}"
            )
    d_sae = ends[-1] if ends else 0
    widths = {name: tensor.shape[-1] for name, tensor in tensors.items() if tensor.ndim}
    d_in, d_out = widths.get("W_enc", 0), widths.get("b_dec", 0)
    shapes = {
        "W_enc": (d_sae, d_in),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        "thresholds": (len(ends),),
    }
    if "thresholds" in tensors and tensors["thresholds"].ndim == 2:
        shapes["thresholds"] = (len(ends), d_sae)
    if "W_skip" in tensors:
        shapes["W_skip"] = (d_out, d_in)
    unknown = set(tensors) - set(shapes)
    if unknown:
        raise InputError(f"{path}: unknown tensor {min(unknown)}; expected {', '.join(shapes)}")
    return shapes
