"""Files as Gemma Scope 2, sparsify and circuit-tracer leave them, and the mistakes of tests/mistakes.md with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.evaluate.fakes import random_coder
from transcoder import Transcoder

D, D_OUT, F, K = 5, 3, 11, 3
Files = dict[str, Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change_json(file: Path, **values: object) -> None:
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def change_tensors(file: Path, **tensors: Tensor | None) -> None:
    stored = load_file(file) | tensors
    save_file({name: tensor.contiguous() for name, tensor in stored.items() if tensor is not None}, file)


CONFIG = {
    "architecture": "jump_relu",
    "type": "transcoder",
    "model_name": "google/gemma-3-1b-pt",
    "hf_hook_point_in": "model.layers.12.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.12.post_feedforward_layernorm.output",
    "width": F,
    "l0": 20,
    "affine_connection": True,
}


def scope_2(folder: Path, d_out: int = D_OUT, dtype: torch.dtype = torch.float32) -> Files:
    """A folder as Gemma Scope 2 has them; thresholds of each latent, a skip connection [D_in, D_out]."""
    shapes = {"w_enc": (D, F), "w_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,), "threshold": (F,)}
    shapes["affine_skip_connection"] = (D, d_out)
    stored = {name: drawn(*shape, seed=seed).to(dtype) for seed, (name, shape) in enumerate(shapes.items())}
    folder.mkdir(parents=True)
    save_file(stored, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return stored


def sparse_coder(folder: Path, d: int = D, f: int = F, k: int = K, **config: object) -> Files:
    """A directory as sparsify's SparseCoder.save_to_disk leaves it."""
    skip = bool(config.get("skip_connection"))
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    shapes |= {"W_skip": (d, d)} if skip else {}
    stored = {name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    folder.mkdir(parents=True)
    save_file(stored, folder / "sae.safetensors")
    known = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": f}
    known |= {"k": k, "multi_topk": False, "skip_connection": skip, "transcode": True, "d_in": d}
    (folder / "cfg.json").write_text(json.dumps(known | config))
    return stored


HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def write_set(folder: Path, *numbers: int, tensors: Files | None = None, **config: object) -> Files:
    """A set as circuit-tracer's to_safetensors and its published configurations have it; layers alike."""
    shapes = {"W_enc": (F, D), "W_dec": (F, D_OUT), "b_enc": (F,), "b_dec": (D_OUT,)}
    stored = {name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    stored |= tensors or {}
    folder.mkdir(parents=True)
    for number in numbers:
        save_file(stored, folder / f"layer_{number}.safetensors")
    known = {"model_name": "Qwen/Qwen3-0.6B", "model_kind": "transcoder_set", **HOOKS} | config
    lines = (f"{key}: {value}\n" for key, value in known.items() if value is not None)
    (folder / "config.yaml").write_text("".join(lines))
    return stored


def sparsify_with(name: str = "layers.1.mlp", **config: object) -> Path:
    """A directory of the tiny model's width, in the current one; its sae.safetensors."""
    sparse_coder(Path(name), d=32, f=64, k=4)
    change_json(Path(name) / "cfg.json", **config)
    return Path(name) / "sae.safetensors"


def scope_with(**config: object) -> None:
    scope_2(Path("scope"))
    change_json(Path("scope/config.json"), **config)


def scope_saying(text: str | None) -> None:
    scope_2(Path("scope"))
    Path("scope/config.json").unlink()
    if text is not None:
        Path("scope/config.json").write_text(text)


def layer_alone() -> None:
    save_file(random_coder(32, 32, (64,)).parameters.named(), "layer_1.safetensors")


def set_cut_short() -> None:
    write_set(Path("set"), 0, 1)
    Path("set/config.yaml").write_text('model_name: "Qwen')


def sparsify_cut_short() -> None:
    file = sparsify_with()
    file.write_bytes(file.read_bytes()[:1000])


def of_top_k() -> None:
    run = Path("checkpoints/transcoder/tiny-llama/layer_1/a")
    replace(Transcoder.load(run), k=4, thresholds=torch.zeros(3)).save(run)


def pickles() -> None:
    Path("mine").mkdir()
    Path("mine/ae.pt").write_bytes(b"\x80\x02")


ELSEWHERE = "[hf://me/mine/0/params.npz, hf://me/mine/1/params.npz]"
MISTAKES: dict[str, Callable[[], object]] = {
    "a layer of a set without its configuration": layer_alone,
    "a layer that is not in the set": lambda: write_set(Path("set"), 0, 2),
    "a set of layers where one is wanted": lambda: write_set(Path("set"), 0, 2),
    "a set whose layers lie elsewhere": lambda: write_set(Path("set"), transcoders=ELSEWHERE),
    "a set whose layers lie in other directories": lambda: write_set(
        Path("set"), transcoders="[../../etc/passwd]"
    ),
    "a set of cross-layer transcoders": lambda: write_set(
        Path("set"), 0, 1, model_kind="cross_layer_transcoder"
    ),
    "a set that reads the residual stream": lambda: write_set(
        Path("set"), 0, 1, feature_input_hook="hook_resid_mid"
    ),
    "a config.yaml that is cut short": set_cut_short,
    "a top-k set without its k": lambda: write_set(Path("set"), 0, 1, activation="topk"),
    "Gemma Scope 2 without its configuration": lambda: scope_saying(None),
    "Gemma Scope 2 with a configuration that is no JSON": lambda: scope_saying("a web page"),
    "an autoencoder of Gemma Scope 2": lambda: scope_with(type="sae"),
    "Gemma Scope 2 of the residual stream": lambda: scope_with(hf_hook_point_in="model.layers.12.output"),
    "Gemma Scope 2 of another layer": scope_with,
    "Gemma Scope 2 of other widths": lambda: scope_with(width=12),
    "an autoencoder of sparsify": lambda: sparsify_with(transcode=False),
    "sparsify's other activation": lambda: sparsify_with(activation="groupmax"),
    "a transcoder of another module": lambda: sparsify_with("layers.1"),
    "sparsify's weights are cut short": sparsify_cut_short,
    "NaN among sparsify's weights": lambda: change_tensors(
        sparsify_with(), b_dec=torch.full((32,), torch.nan)
    ),
    "seeds of sparsify where one is wanted": lambda: [
        sparsify_with(f"layers.1.mlp/seed{seed}") for seed in range(2)
    ],
    "a convention that its file contradicts": sparsify_with,
    "a directory with pickles alone": pickles,
    "top-k, for a format that gates by thresholds": of_top_k,
}
