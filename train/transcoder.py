"""The transcoder: its parameters, and encode, decode, prefixes as other stages use them.

Shapes: n rows, D_in, D_out, F latents, G groups; prefix g is latents [0, prefix_ends[g]).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from train import weights

ENCODER_SCALE = 0.1
"""Of the first weights. 0.1 beat 1 and Kaiming-uniform: FVU after 800 steps 0.424, 0.453, 0.456."""
ROWS_PER_BLOCK = 4096  # of __call__: bounds the dense activations to 0.3 GB at 18,432 latents


@dataclass(frozen=True, eq=False)
class Parameters:
    """What training changes. In training they live in normalised space, saved they are folded."""

    W_enc: Float[Tensor, "F D_in"]
    b_enc: Float[Tensor, " F"]
    W_dec: Float[Tensor, "F D_out"]
    """Rows of unit norm, in both spaces."""
    b_dec: Float[Tensor, " D_out"]
    W_skip: Float[Tensor, "D_out D_in"] | None = None

    def named(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def map(self, change: Any) -> "Parameters":
        return Parameters(**{name: change(tensor) for name, tensor in self.named().items()})

    def folded(self, scale_in: float, scale_out: float) -> "Parameters":
        """Parameters on raw activations, given those on x = input / scale_in, y = output / scale_out.

        With a = relu(x W_enc^T + b_enc) the raw activation is scale_out * a, so that decoder rows
        keep unit norm: output = scale_out * y = (scale_out * a) W_dec + scale_out * b_dec.
        """
        return Parameters(
            W_enc=self.W_enc * (scale_out / scale_in),
            b_enc=self.b_enc * scale_out,
            W_dec=self.W_dec.clone(),
            b_dec=self.b_dec * scale_out,
            W_skip=None if self.W_skip is None else self.W_skip * (scale_out / scale_in),
        )

    def unfolded(self, scale_in: float, scale_out: float) -> "Parameters":
        """The inverse of `folded`."""
        return self.folded(1 / scale_in, 1 / scale_out)


def initialise(
    d_sae: int,
    mean_input: Float[Tensor, " D_in"],
    mean_output: Float[Tensor, " D_out"],
    *,
    skip: bool,
    seed: int,
) -> Parameters:
    """Parameters before the first step, in normalised space, on the CPU.

    b_dec is the mean output, W_dec random unit rows, W_enc normal with standard deviation
    ENCODER_SCALE / sqrt(D_in), W_skip zero. b_enc makes the mean input's pre-activations zero: half of
    the inputs' energy can lie in their mean (52 % in SmolLM2's layer 12), and without this half of
    the latents start negative on every row, where no gradient, not even the aux loss's, reaches them.
    """
    generator = torch.Generator().manual_seed(seed)
    d_in, mean_input = len(mean_input), mean_input.to(torch.float32)
    W_enc = torch.randn(d_sae, d_in, generator=generator).mul_(ENCODER_SCALE / d_in**0.5)
    W_dec = torch.randn(d_sae, len(mean_output), generator=generator)
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    return Parameters(
        W_enc=W_enc,
        b_enc=-(W_enc @ mean_input),
        W_dec=W_dec,
        b_dec=mean_output.to(torch.float32).clone(),
        W_skip=torch.zeros(len(mean_output), d_in) if skip else None,
    )


@dataclass(frozen=True, eq=False)
class Transcoder:
    """A trained transcoder of raw MLP inputs to raw MLP outputs.

    acts = pre * (pre > threshold),  pre = inputs W_enc^T + b_enc
    output = acts W_dec + b_dec (+ inputs W_skip^T)
    """

    parameters: Parameters
    thresholds: Float[Tensor, " G"]
    """Of every prefix; the last is this transcoder's own."""
    prefix_ends: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Settings, harvest fingerprint, versions and training record of the run that made it."""

    W_enc = property(lambda self: self.parameters.W_enc)
    b_enc = property(lambda self: self.parameters.b_enc)
    W_dec = property(lambda self: self.parameters.W_dec)
    b_dec = property(lambda self: self.parameters.b_dec)
    W_skip = property(lambda self: self.parameters.W_skip)

    @property
    def threshold(self) -> float:
        return float(self.thresholds[-1])

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    def pre_activations(self, inputs: Float[Tensor, "n D_in"]) -> Float[Tensor, "n F"]:
        return torch.addmm(self.b_enc, inputs, self.W_enc.T)

    def encode(self, inputs: Float[Tensor, "n D_in"]) -> Float[Tensor, "n F"]:
        """Activations; zero where the pre-activation is not above the threshold."""
        pre = self.pre_activations(inputs)
        return pre.mul_(pre > self.threshold)

    def decode(self, acts: Float[Tensor, "n F"]) -> Float[Tensor, "n D_out"]:
        """The latents' part of the output and the bias; a skip connection is added by calling."""
        return torch.addmm(self.b_dec, acts, self.W_dec)

    def __call__(self, inputs: Float[Tensor, "n D_in"]) -> Float[Tensor, "n D_out"]:
        """The reconstructed outputs of raw inputs, the skip connection included."""
        blocks = [self.decode(self.encode(rows)) for rows in inputs.split(ROWS_PER_BLOCK)]
        outputs = torch.cat(blocks) if blocks else inputs.new_zeros(0, self.d_out)
        return outputs if self.W_skip is None else outputs.addmm_(inputs, self.W_skip.T)

    def prefix(self, g: int) -> "Transcoder":
        """Prefix `g` as a complete, narrower transcoder with its own threshold."""
        g = range(len(self.prefix_ends))[g]
        end, whole = self.prefix_ends[g], self.parameters
        narrow = replace(whole, W_enc=whole.W_enc[:end], b_enc=whole.b_enc[:end], W_dec=whole.W_dec[:end])
        return Transcoder(narrow, self.thresholds[: g + 1], self.prefix_ends[: g + 1], self.metadata)

    def to(self, device: str | torch.device) -> "Transcoder":
        moved = self.parameters.map(lambda tensor: tensor.to(device))
        return replace(self, parameters=moved, thresholds=self.thresholds.to(device))

    def save(self, path: str | Path) -> None:
        """Write to a .safetensors file, or into a run directory."""
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / weights.FILE_NAME
        tensors = {**self.parameters.named(), "thresholds": self.thresholds}
        weights.write(file, tensors, {**self.metadata, "prefix_ends": self.prefix_ends})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Transcoder":
        """Read a run directory or a .safetensors file.

        Raises `InputError` that names the file, the tensor, what was expected and what was found.
        """
        path = Path(path)
        tensors, metadata = weights.read(path, device)
        ends = tuple(metadata.pop("prefix_ends", ()))
        for key in ("format", "format_version"):
            del metadata[key]
        shapes = _shapes(path, tensors, ends)
        checked = {
            name: weights.check_shape(path, name, tensors.get(name), shape) for name, shape in shapes.items()
        }
        thresholds = checked.pop("thresholds")
        return cls(Parameters(**checked), thresholds, ends, metadata)


def _shapes(path: Path, tensors: Mapping[str, Tensor], ends: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes that a file's tensors must have, from its prefix ends, W_enc's and b_dec's widths."""
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
    if "W_skip" in tensors:
        shapes["W_skip"] = (d_out, d_in)
    unknown = set(tensors) - set(shapes)
    if unknown:
        raise weights.InputError(f"{path}: unknown tensor {min(unknown)}; expected {', '.join(shapes)}")
    return shapes
