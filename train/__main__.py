"""python -m train --layer 17 [--run name] [--section.key value ...]"""

from common.cli import load, parser, run_stage


def main() -> None:
    settings, _ = load(parser("train", "Train a nested transcoder on an activation store."))
    from rich.console import Console  # after the settings are checked: torch takes seconds to import

    from train import record
    from train.finish import summary
    from train.log import where
    from transcoder.weights import read_metadata

    run_dir, store_path = settings.run_dir(), settings.store_path(settings.layer)
    done = record.finished(run_dir, settings)
    if done:
        print(f"already trained on {done['training']['rows']:,} rows, nothing to do")
    else:
        from common.device import share_cores
        from shards import Store
        from train.loop import train

        share_cores()
        train(settings, Store.of(settings))

    Console().print(summary(read_metadata(run_dir)))
    print(f"store {store_path}\nrun   {run_dir}", *where(run_dir), sep="\n")


if __name__ == "__main__":
    run_stage(main)
