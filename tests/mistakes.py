"""The mistakes of tests/mistakes.md: a directory in which everything is right, and how each mistake is made in it.

Everything happens in the current directory: `pipeline.toml`, `text.jsonl`, a model, a finished harvest of its layer 1
and an unfinished one of layer 2, a trained and evaluated run `a`.
"""

import fcntl
import gzip
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from common import cli
from common.cli import run_stage
from common.files import sha256
from common.settings import ROOT
from shards.commit import commit_text, store_files
from shards.writer import StoreWriter
from tests.evaluate.fakes import random_coder
from tests.models import save_model, sentences, write_jsonl
from tests.transcoder import others
from transcoder import weights

MODEL = Path("models/tiny-llama")
STORE = Path("activations/tiny-llama/layer_1.zarr")
UNFINISHED = Path("activations/tiny-llama/layer_2.zarr")
RUN = Path("checkpoints/transcoder/tiny-llama/layer_1/a")
SETTINGS = """
[model]
name = "models/tiny-llama"
device = "cpu"

[data]
files = ["text.jsonl"]
pack = "concat"

[harvest]
rows = 2000
context_length = 32
heldout_fraction = 0.1

[transcoder]
d_sae = 64
group_sizes = [8, 16, 40]
k = 4

[train]
rows = 2048
batch_size = 64
lr = 3e-3
warmup_steps = 8
sample_every = 4

[wandb]
mode = "disabled"

[profile.quick.train]
rows = 512
"""


def call(module: str, *arguments: str) -> int:
    """`python -m module arguments` in this process; its exit code."""
    package = (ROOT / Path(*module.split("."))).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(cli, "PIPELINE_TOML", Path("pipeline.toml"))
        with pytest.raises(SystemExit) as stopped:
            run_stage(main)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def make_right() -> None:
    """Fill the current directory."""
    from harvest.run import StoreWriter

    Path("pipeline.toml").write_text(SETTINGS)
    write_jsonl(Path("text.jsonl"), sentences(200))
    save_model(MODEL, "llama")
    assert call("harvest", "--layer", "1") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "write_window", _stopped)
        assert call("harvest", "--layer", "2") == 130
    assert call("train", "--layer", "1", "--run", "a") == 0
    assert call("evaluate", "--layer", "1", "--run", "a", "--cross-entropy-tokens", "0") == 0


def _stopped(*_: Any) -> None:
    raise KeyboardInterrupt


# -- how mistakes are made -----------------------------------------------------------------------------


def edit(old: str, new: str, file: str | Path = "pipeline.toml") -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new, 1))


def write(file: str | Path, data: str | bytes) -> None:
    Path(file).write_bytes(data.encode() if isinstance(data, str) else data)


def documents(*lines: str | bytes) -> None:
    write(
        "text.jsonl", b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    )


def cut(file: str | Path) -> None:
    """Leave the first half."""
    write(file, Path(file).read_bytes()[: Path(file).stat().st_size // 2])


def remove(path: str | Path) -> None:
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def in_place_of(path: str | Path, *, directory: bool = False) -> None:
    """An empty file, or a directory, where the other was."""
    remove(path)
    Path(path).mkdir() if directory else write(path, "")


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def change(file: Path, *without: str, **tensors: torch.Tensor) -> None:
    """Other tensors in a .safetensors file, and none whose name begins like one of `without`."""
    kept = {
        name: tensor for name, tensor in load_file(file).items() if not name.startswith(without or ("-",))
    }
    save_file(kept | tensors, file, header_of(file))


def in_header(file: Path, **values: str) -> None:
    save_file(load_file(file), file, header_of(file) | values)


def in_json(file: Path, **values: Any) -> None:
    write(file, json.dumps(json.loads(file.read_text()) | values))


def other_model(family: str, **changes: Any) -> None:
    remove(MODEL)
    save_model(MODEL, family, **changes)


def larger_tokenizer() -> None:
    model = json.loads((MODEL / "tokenizer.json").read_text())["model"]
    more = {f"word{number}": number for number in range(len(model["vocab"]), 5000)}
    in_json(MODEL / "tokenizer.json", model=model | {"vocab": model["vocab"] | more})


def with_a_window() -> None:
    """The unfinished harvest, as if its first window were written: it is not begun anew."""
    (UNFINISHED / ".harvest/records").mkdir()
    write(UNFINISHED / ".harvest/records/train-000000.json", "{}")


def own_code() -> None:
    in_json(MODEL / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    write(MODEL / "own.py", "raise SystemExit('the model ran its code')")


def other_bos() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.save_pretrained(MODEL)


def recommitted() -> None:
    """The store's list of digests, made anew: what was changed passes for what was harvested."""
    write(STORE / "files.sha256", commit_text({name: sha256(STORE / name) for name in store_files(STORE)}))


def later_format() -> None:
    edit('"format_version": 1', '"format_version": 2', STORE / "zarr.json")
    recommitted()


def harvested_again() -> None:
    remove(STORE)
    assert call("harvest", "--layer", "1", "--harvest.seed", "1") == 0


def locked(root: Path) -> Any:
    """Another process' hold on a store, as long as the file that is returned is open."""
    file = (root / ".harvest" / "lock").open("w")
    file.write("4711\n")
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def latest_state() -> Path:
    return RUN / "state" / (RUN / "state" / "latest").read_text().strip()


def nan_in(name: str, file: Path) -> None:
    change(file, **{name: torch.full_like(load_file(file)[name], float("nan"))})


def in_parts() -> Path:
    """The run as one above the limit of a file is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MAX_FILE", 10_000)
        weights.write(RUN, *weights.read(RUN))
    return RUN


W = RUN / weights.FILE_NAME
SAMPLES = RUN / "activation_samples" / "samples.jsonl"
TINY = MODEL / "model.safetensors"

CHAT = '{"messages": [{"role": "user", "content": "one"}]}'

MISTAKES: dict[str, Callable[[], object]] = {
    # settings
    "a bracket is missing": lambda: edit("[train]", "[train"),
    "a key is there twice": lambda: edit("k = 4", "k = 4\nk = 8"),
    "a section is misspelt": lambda: edit("[train]", "[trian]"),
    "a key is misspelt": lambda: edit("lr = 3e-3", "lrr = 3e-3"),
    "a key stands outside its section": lambda: write("pipeline.toml", "lr = 3e-3" + SETTINGS),
    "a section is given as a value": lambda: write("pipeline.toml", 'wandb = "offline"'),
    "a profile is given as a value": lambda: write("pipeline.toml", 'profile = "quick"'),
    "a recipe without its layer": lambda: write("pipeline.toml", '[recipe."models/tiny-llama"]\ntrain = 1'),
    "a run named in the file": lambda: write("pipeline.toml", 'run = "a"' + SETTINGS),
    "text where a number belongs": lambda: edit("lr = 3e-3", 'lr = "fast"'),
    "a negative number": lambda: edit("rows = 2000", "rows = -2000"),
    "no number at all": lambda: edit("lr = 3e-3", "lr = nan"),
    "a fraction where a whole number belongs": lambda: edit("k = 4", "k = 4.5"),
    "groups that do not add up": lambda: edit("[8, 16, 40]", "[8, 16, 64]"),
    "more active latents than there are": lambda: edit("k = 4", "k = 96"),
    "a size that is none": lambda: edit("d_sae = 64", 'd_sae = "2y"'),
    "fewer rows than a batch": lambda: edit("rows = 2048", "rows = 20"),
    "a word that is not one of those known": lambda: edit('"disabled"', '"on"'),
    "there is no pipeline.toml": lambda: remove("pipeline.toml"),
    "pipeline.toml is a directory": lambda: in_place_of("pipeline.toml", directory=True),
    "pipeline.toml is not UTF-8": lambda: write("pipeline.toml", b"# caf\xe9\n"),
    # models
    "no config.json": lambda: remove(MODEL / "config.json"),
    "config.json is damaged": lambda: write(MODEL / "config.json", "{"),
    "config.json is damaged (a plan)": lambda: write(MODEL / "config.json", "{"),
    "pickled weights only": lambda: TINY.rename(MODEL / "pytorch_model.bin"),
    "the model's weights are cut short": lambda: cut(TINY),
    "some of the weights are missing": lambda: change(TINY, "model.layers.0.mlp"),
    "weights of another width than config.json says": lambda: in_json(
        MODEL / "config.json", intermediate_size=32
    ),
    "no tokenizer": lambda: [remove(file) for file in MODEL.glob("token*")],
    "the tokenizer is damaged": lambda: write(MODEL / "tokenizer.json", "{"),
    "a family whose blocks have no norm before the MLP (Phi)": lambda: other_model("phi"),
    "a model that TransformerLens cannot run (GPT-NeoX with two key heads)": lambda: other_model("gpt_neox"),
    "the tokenizer of a larger model": larger_tokenizer,
    "no causal model (T5)": lambda: in_json(MODEL / "config.json", model_type="t5"),
    "weights that hold NaN (the unfinished store stays)": lambda: nan_in(
        "model.layers.0.mlp.down_proj.weight", TINY
    ),
    "another model under the same name (a window is written)": lambda: [
        other_model("llama", intermediate_size=48),
        with_a_window(),
    ],
    "an unfinished store of other settings (a window is written)": with_a_window,
    "code of its own in config.json": own_code,
    "code of its own in config.json (a plan)": own_code,
    "weights replaced after a harvest": lambda: nan_in("model.layers.0.mlp.down_proj.weight", TINY),
    "weights replaced after a harvest (a new run)": lambda: nan_in(
        "model.layers.0.mlp.down_proj.weight", TINY
    ),
    "a token was added, its embedding was not": other_bos,
    "weights that git has not fetched": lambda: write(TINY, "version https://git-lfs.github.com/spec/v1\n"),
    "weights that are stored as codes": lambda: change(
        TINY, **{"model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}
    ),
    "an adapter beside the model": lambda: write(MODEL / "adapter_config.json", "{}"),
    "only a tokenizer's settings": lambda: [
        remove(MODEL / "tokenizer.json"),
        in_json(MODEL / "tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
    ],
    "no GGUF file": lambda: write("models/tiny.gguf", "a web page"),
    # text
    "a directory without text": lambda: Path("texts").mkdir(),
    "a file of another kind": lambda: write("text.tsv", "text"),
    "a broken line": lambda: documents('{"text": "one"}', '{"text": "two}', '{"text": "three"}'),
    "a column of numbers": lambda: documents('{"text": 1}', '{"text": 2}'),
    "a text that is null": lambda: documents('{"text": "one"}', '{"text": null}'),
    "lines that are no objects": lambda: documents('"one"', '"two"'),
    "an empty file": lambda: documents(),
    "empty documents only": lambda: documents(*['{"text": ""}'] * 9),
    "documents of one token only": lambda: documents(*['{"text": "a"}'] * 9),
    "bytes that are not UTF-8": lambda: documents('{"text": "one"}', b'{"text": "caf\xe9"}'),
    "a .txt that is not UTF-8": lambda: write("text.txt", b"one\ncaf\xe9\n"),
    "half an emoji": lambda: documents('{"text": "one"}', '{"text": "two\\ud83d"}'),
    "a .csv whose text is not quoted": lambda: write("text.csv", "text\none, two\n"),
    "a .txt that is UTF-16": lambda: write("text.txt", "one".encode("utf-16")),
    "a packed file whose name does not say so": lambda: documents(gzip.compress(b"{}")),
    "a packed file that is cut short": lambda: write("text.txt.gz", gzip.compress(b"one")[:-8]),
    "a pointer of Git LFS": lambda: write(
        "text.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0"
    ),
    "chats without their special tokens": lambda: documents(CHAT),
    "chats for a model without a template": lambda: documents(CHAT),
    "a .parquet that is none": lambda: write("text.parquet", "PAR1"),
    # stores
    "the harvest's plan is damaged": lambda: write(UNFINISHED / ".harvest/plan.json", "{"),
    "the harvest's source is damaged": lambda: write(UNFINISHED / ".harvest/source.json", "{"),
    "another process is writing the store": lambda: locked(UNFINISHED),
    "a file where the store should be": lambda: in_place_of(STORE),
    "a store of a later version": later_format,
    "the manifest was edited": lambda: edit('"layer": 1', '"layer": 0', STORE / "zarr.json"),
    "the manifest was edited; to be repaired": lambda: edit('"layer": 1', '"layer": 0', STORE / "zarr.json"),
    "files.sha256 was edited": lambda: edit("tokenizer", "tokeniser", STORE / "files.sha256"),
    "a shard is cut short, asked to train": lambda: cut(STORE / "train/inputs/c/0/0"),
    "a shard is cut short": lambda: cut(STORE / "train/inputs/c/0/0"),
    "a shard is missing (the language model's losses stay)": lambda: remove(STORE / "heldout/outputs/c/0/0"),
    "the store's tokenizer is missing": lambda: remove(STORE / "tokenizer.json"),
    "labels of another text": lambda: write_jsonl(Path("text.jsonl"), sentences(199)),
    "train rows that were removed after training": lambda: StoreWriter(STORE).remove_rows(),
    "train rows to evaluate that were removed": lambda: StoreWriter(STORE).remove_rows(),
    "removed train rows that absorption needs": lambda: StoreWriter(STORE).remove_rows(),
    "a store of another model": lambda: STORE.parent.rename("activations/gpt2"),
    "a store of another layer": lambda: STORE.rename(STORE.with_name("layer_0.zarr")),
    "a store of another layer (a harvest)": lambda: STORE.rename(STORE.with_name("layer_0.zarr")),
    # runs
    "the run is not trained to its end": lambda: remove(W),
    "the run's weights are cut short": lambda: cut(W),
    "one of the files of a large run is missing": lambda: remove(
        in_parts() / "transcoder-00001-of-00002.safetensors"
    ),
    "one of the files of a large run is another run's": lambda: [in_parts(), in_header(W, public_name='"b"')],
    "prefixes that do not rise": lambda: in_header(W, prefix_ends="[24, 8, 64]"),
    "a header whose source is a word": lambda: in_header(W, source='"gemma"'),
    "a tensor is missing": lambda: change(W, "b_dec"),
    "a tensor of another width": lambda: change(W, W_dec=torch.zeros(64, 31)),
    "a threshold is NaN": lambda: nan_in("thresholds", W),
    "a weight is infinite": lambda: change(W, b_dec=torch.full((32,), float("inf"))),
    "a run of a later version": lambda: in_header(W, format_version="2"),
    "a run that is not trained to its end, in words": lambda: remove(W),
    "a transcoder of another layer": lambda: random_coder(32, 32, (8, 24, 64)).save(RUN),
    "a start from a run of another layer": lambda: random_coder(32, 32, (8, 24, 64)).save("layer_0"),
    "an import of another layer": lambda: random_coder(32, 32, (8, 24, 64)).save("layer_0"),
    "a run of another layer to compare with": lambda: random_coder(32, 32, (8, 24, 64)).save("layer_0"),
    "a pickle": lambda: write("ae.pt", b"\x80\x02"),
    "a transcoder of another model's width": lambda: random_coder(16, 16, (8, 24, 64), layer=1).save(RUN),
    "the store was harvested again": harvested_again,
    "settings.json is damaged": lambda: write(RUN / "settings.json", "{"),
    "settings.json of another version": lambda: edit('"order_seed"', '"order_sead"', RUN / "settings.json"),
    "the checkpoint is cut short": lambda: cut(latest_state() / "tensors.safetensors"),
    "the checkpoint's state.json is damaged": lambda: write(latest_state() / "state.json", "{"),
    "the checkpoint lacks a tensor": lambda: change(latest_state() / "tensors.safetensors", "last_fired"),
    "a checkpoint of another width": lambda: change(
        latest_state() / "tensors.safetensors", last_fired=torch.zeros(3, dtype=torch.int64)
    ),
    "a checkpoint of another version": lambda: in_json(latest_state() / "state.json", version=9),
    "the log has a broken line": lambda: edit('{"step"', '{"step', RUN / "metrics.jsonl"),
    "the log has a broken line; to be evaluated": lambda: edit('{"step"', '{"step', RUN / "metrics.jsonl"),
    "metrics.json is damaged": lambda: write(RUN / "evaluation/metrics.json", "{"),
    "the samples are damaged": lambda: write(SAMPLES, "{"),
    "a line of the samples lacks its group": lambda: write(SAMPLES, '{"latent": 0, "samples": []}\n'),
    "no samples were collected": lambda: remove(SAMPLES),
    "no .npz": lambda: write("params.npz", "a web page"),
    "an .npz of pickles": lambda: np.savez("params.npz", W_enc=np.array([{}], object)),
    "notes of another layer": lambda: write(RUN / "notes.csv", "layer,latent,label\n17,3,cities\n"),
    "notes of a latent that is not there": lambda: write(RUN / "labels.csv", "layer;latent;label\n1;64;a\n"),
    "notes without labels": lambda: write(RUN / "notes.csv", "layer,latent,score\n1,3,0.5\n"),
    "the run is not evaluated": lambda: remove(RUN / "evaluation"),
    "explanations of a run that is not evaluated": lambda: remove(RUN / "evaluation"),
    "two files of explanations": lambda: [
        write(RUN / f"explanations.{ending}", "[]") for ending in ("csv", "json")
    ],
    # layer sets
    "a run that is not evaluated, for Neuronpedia": lambda: remove(RUN / "evaluation"),
    "a layer of the set is not evaluated": lambda: remove(RUN / "evaluation"),
    "the run was trained on since its evaluation": lambda: change(W, b_dec=torch.zeros(32)),
} | others.MISTAKES
"""What is wrong, in the page's words -> what makes it so. Mistakes of the command line need nothing made."""

ENVIRONMENTS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "no GPU where one is asked for": lambda patch: patch.setattr(torch.cuda, "device_count", lambda: 0),
    "a WANDB_MODE that W&B does not have": lambda patch: patch.setenv("WANDB_MODE", "of"),
    "wandb is not installed": lambda patch: patch.setitem(sys.modules, "wandb", None),
    "WORLD_SIZE is left over from another program": lambda patch: patch.setenv("WORLD_SIZE", "2"),
    "only a part of srun's environment": lambda patch: [
        patch.setenv(name, value)
        for name, value in {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}.items()
    ],
    "a batch that three processes cannot share": lambda patch: [
        patch.setenv(name, value)
        for name, value in {
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "RANK": "0",
            "MASTER_ADDR": "::1",
            "MASTER_PORT": "1",
        }.items()
    ],
    "an endpoint of an object store without http://": lambda patch: patch.setenv(
        "AWS_ENDPOINT_URL", "localhost:9000"
    ),
    "a key of an object store with a line break": lambda patch: patch.setenv("AWS_SECRET_ACCESS_KEY", "a\n"),
    "no language model to explain with": lambda patch: patch.delenv("OPENAI_MODEL", raising=False),
    "no key for OpenAI's endpoint": lambda patch: [
        patch.delenv(name, raising=False) for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL")
    ],
}
"""The same of what is around the command; undone after it."""
