"""python -m train --layer 17 [--run name] [--section.key value ...]"""

from typing import Any

from rich.console import Console
from rich.table import Table

import pipeline
from train import record


def main() -> None:
    settings, _ = pipeline.load(pipeline.parser("train", "Train a nested transcoder on an activation store."))
    run_dir = settings.run_dir()
    done = record.finished(run_dir, settings)
    if done is not None:
        print(f"{run_dir}: already trained on {done['training']['rows']:,} rows, nothing to do")
    else:
        from shards import Store
        from train.loop import train

        transcoder, _ = train(settings, Store.open(settings.store_path(settings.layer)))
        done = transcoder.metadata | {"thresholds": transcoder.thresholds.tolist()}
    summary(done)


def summary(metadata: dict[str, Any]) -> None:
    """Print the held-out numbers of every prefix."""


if __name__ == "__main__":
    pipeline.run_stage(main)
