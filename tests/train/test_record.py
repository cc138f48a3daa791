"""What a run directory says about the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.settings import Data, Harvest, Settings, validated
from tests.fixtures import make_store
from tests.train.runs import sparse_rows
from train import record
from train.loop import train
from transcoder import Transcoder

Make = Callable[..., Settings]


def test_a_run_records_the_text_and_harvest_of_its_store(make_settings: Make, tmp_path: Path) -> None:
    """Not those of the training's command line, which decide nothing, nor what the store does not know."""
    of_files = {"dataset": "files", "files": ["a" * 64, "b" * 64], "special_tokens": "parse", "seed": 3}
    rows = sparse_rows(1024, 2), sparse_rows(64, 3)
    changes: dict[str, Any] = {"dtype": "bfloat16", "text_column": "body", "pack": "document"} | of_files
    store = make_store(tmp_path / "tiny/layer_0.zarr", *rows, **changes)
    base = make_settings(train__rows=64, train__warmup_steps=0, model__dtype="float32")
    other = {
        "data": Data(text_column="other", files=("x.txt",)),
        "harvest": Harvest(rows=7, storage="bfloat16"),
    }
    settings = base.model_copy(update=other)
    train(settings, store)
    saved = json.loads((settings.run_dir() / "settings.json").read_text())["settings"]
    assert saved == Transcoder.load(settings.run_dir()).metadata["settings"]
    assert saved["data"] == {
        "dataset": "files",
        "name": None,
        "revision": None,
        "text_column": "body",
        "files": of_files["files"],
        "special_tokens": "parse",
        "pack": "document",
    }
    assert saved["harvest"] == {
        "rows": 1024,
        "context_length": 16,
        "input": "normalized",
        "storage": "float32",
        "compressor": "zstd-3",
        "heldout_fraction": 0.1,
        "seed": 3,
    }
    assert saved["model"] == base.model_dump(mode="json")["model"] | {"dtype": "bfloat16"}
    kept = ("transcoder", "train", "paths", "wandb", "evaluate", "run", "layers")
    assert {key: saved[key] for key in kept} == {key: settings.model_dump(mode="json")[key] for key in kept}
    embedded = {"dataset": "embedded/english", "files": ["c" * 64], "dataset_split": "train"}
    compressors = {"input_compressor": "blosc-zstd-1-shuffle", "output_compressor": "blosc-zstd-1-shuffle"}
    source = store.manifest.source.model_copy(update=embedded | compressors)
    again = record.trained_with(validated(saved, "settings.json"), source)
    assert (again["data"]["files"], again["data"]["split"]) == ([], "train")
    assert again["harvest"]["compressor"] == "blosc-zstd-1-shuffle"
