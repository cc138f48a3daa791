"""python -m train --layer 17 [--run name] [--section.key value ...]"""

from pathlib import Path

from common.cli import parser, read, run_stage
from common.layers.driver import add_spread, over_layers
from common.settings import Settings
from transcoder.layers import n_layers


def main() -> None:
    options = parser("train", "Train a nested transcoder on an activation store.")
    add_spread(options)
    asked = read(options)

    def lines(settings: Settings) -> list[dict[str, str]]:
        from train.finish import line_of
        from transcoder.weights import read_metadata

        return [line_of(read_metadata(settings.run_dir()))]

    over_layers(asked, _train, n_layers=n_layers, lines=lines)


def _train(settings: Settings, of_several: bool) -> None:
    from common.terminal.table import console  # after the settings are checked: torch takes seconds to import
    from shards import Store
    from shards.remote import is_url
    from train import record
    from train.finish import summary
    from train.log import log_lines, where
    from transcoder.weights import read_metadata

    run_dir, store_path = settings.run_dir(), settings.store_path(settings.layer)
    store = Store.of(settings) if is_url(store_path) or Path(store_path).exists() else None
    metadata = record.finished(run_dir, settings, store and store.manifest.fingerprint)
    if metadata:
        gone = (
            "" if store else f" (no store at {store_path}: whether it was trained on that one is not checked)"
        )
        print(f"already trained on {metadata['training']['rows']:,} rows{gone}, nothing to do")
        if of_several:
            return
    else:
        from common.device import share_cores
        from train.loop import train

        share_cores()
        train(settings, store or Store.of(settings))

    lines = log_lines(run_dir / "metrics.jsonl")
    peak = lines[-1][1].get("peak_memory_bytes") if lines else None
    console().print(summary(read_metadata(run_dir), int(peak) if peak else None))
    print(
        f"store {store_path}\nrun   {run_dir}",
        *(where(run_dir) if settings.wandb.mode != "disabled" else ()),
        sep="\n",
    )


if __name__ == "__main__":
    run_stage(main)
