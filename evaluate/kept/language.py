"""language.safetensors of an evaluation: results of the language model, so that it need not run again.

The losses of each context, and what every latent does to the logits; the numbers made of them are in metrics.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from common.errors import InputError, first_line
from evaluate.kept.evaluations import Evaluation
from evaluate.labels.effects import LogitEffects
from evaluate.metrics.language import Language
from transcoder.weights import save_tensors

FILE = "language.safetensors"
LOSS, EFFECT = "cross_entropy.", "effects."


def save_language(folder: Path, language: Language, provenance: Mapping[str, object]) -> None:
    """Write the file of an evaluation whose cross-entropy was measured."""
    arrays = {f"{LOSS}{name}": values for name, values in language.by_context.items()}
    arrays |= {f"{EFFECT}{name}": values for name, values in language.effects.arrays().items()}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    save_tensors(folder / FILE, tensors, {"provenance": json.dumps(provenance)})


def read_language(evaluation: Evaluation) -> Language:
    """Results of the language model from an earlier evaluation; raises `InputError` if the file is damaged."""
    path, metrics = evaluation.folder / FILE, evaluation.metrics
    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = {
            name.removeprefix(EFFECT): values for name, values in arrays.items() if name.startswith(EFFECT)
        }
        effects = LogitEffects.of(own)
    except (OSError, SafetensorError, LookupError) as error:
        raise InputError(
            f"{path}: damaged ({first_line(error)}); remove {evaluation.folder} and evaluate again (make evaluate)"
        ) from error
    return Language(
        cross_entropy=metrics.cross_entropy,
        prefixes=[prefix.cross_entropy for prefix in metrics.prefixes if prefix.cross_entropy],
        effects=effects,
        by_context={
            name.removeprefix(LOSS): values for name, values in arrays.items() if name.startswith(LOSS)
        },
    )
