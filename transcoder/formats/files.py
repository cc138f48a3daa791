"""What the readers of other tools' directories share: a JSON object, its values, tensors in float32."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from transcoder import tensor_files, weights

LARGEST = 1 << 20
"""Bytes of a configuration; those seen have less than 10,000."""


def text_of(path: Path, whose: str) -> str:
    """A configuration's text; raises `InputError` where it is missing, too long or no UTF-8."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8-sig") if size <= LARGEST else None
    except FileNotFoundError:
        raise InputError(f"{path}: not found; {whose}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if text is None:
        raise InputError(f"{path}: expected a configuration, found {size:,} bytes")
    return text


def json_object(path: Path, whose: str) -> dict[str, Any]:
    """The object in a JSON file; `whose` says who keeps it there, where it is missing."""
    text = text_of(path, whose)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {shown(value)}")
    return value


def value_of(path: Path, config: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """`config[key]`, of exactly that `kind`; `default`, where there is one, for a missing key or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not kind:
        words = {int: "a whole number", bool: "true or false", str: "a string"}[kind]
        raise InputError(f"{path}: {key}: expected {words}, found {shown(value)}")
    return value


def size_of(path: Path, config: Mapping[str, Any], key: str) -> int:
    """A whole number of at least 1."""
    value = value_of(path, config, key, int)
    if value < 1:
        raise InputError(f"{path}: {key}: expected at least 1, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value from a file in few characters, however large it is."""
    if value is None:
        return "none"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return f"{value!r:.80}"


def floats_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name, floats of any size in float32; those of float32 are maps of it."""
    stored, _ = tensor_files.mapped(path)
    return {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in stored.items()
    }


def extent(stored: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Length of a tensor along an axis; 0 where it has none: its shape is refused then."""
    shape = stored[name].shape if name in stored else ()
    return shape[axis] if -len(shape) <= axis < len(shape) else 0


def exactly(
    path: Path, stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors that `shapes` names, each of its shape and float32; `InputError` for any other one too."""
    checked = {
        name: weights.check_shape(path, name, stored.get(name), shape) for name, shape in shapes.items()
    }
    if unknown := stored.keys() - shapes.keys():
        raise InputError(f"{path}: unknown tensor {min(unknown):.80}; expected {', '.join(shapes)}")
    return checked
