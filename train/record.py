"""What a run directory says about itself: settings.json, and the metadata of the finished weights."""

import json
import os
import re
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError, shown
from common.files import inside, write_whole
from common.settings import FREE, ROOT, Data, Harvest, Settings, validated
from shards.manifest import Manifest, Source
from shards.storage import STORAGES
from transcoder import weights

FILE_NAME = weights.BEGUN


def identity(settings: Settings, d_in: int) -> dict[str, Any]:
    """Setting -> value, of everything that decides a run's weights, sizes as numbers of latents."""
    d_sae, groups = settings.transcoder.resolve(d_in)
    values: dict[str, Any] = {
        "layer": settings.layer
    }  # the model is compared by its weights, not by its name
    values |= {f"train.{key}": value for key, value in settings.train if key not in FREE}
    values |= {f"transcoder.{key}": value for key, value in settings.transcoder}
    return values | {"transcoder.d_sae": d_sae, "transcoder.group_sizes": groups}


def trained_with(settings: Settings, source: Source) -> dict[str, Any]:
    """The settings of a run as plain values, with [data], [harvest] and model.dtype as its store was made with.

    Those of the training's own command decide nothing. Local files are there by their digests; what a store does not
    know (data.on_bad_row, harvest.batch_size and its limits) is left out.
    """
    files = source.files.values() if isinstance(source.files, dict) else source.files
    automatic = STORAGES[source.storage].compressors == (source.input_compressor, source.output_compressor)
    harvest = source.model_dump(include=set(Harvest.model_fields))
    data = source.model_dump(include=set(Data.model_fields) - {"revision"}) | {
        "name": source.dataset_name,
        "revision": source.dataset_revision,
        "files": list(files) if source.dataset == "files" else [],
        **({"split": source.dataset_split} if source.dataset_split else {}),
    }
    values = settings.model_dump(mode="json")
    return values | {
        "model": values["model"] | {"dtype": source.dtype},
        "data": data,
        "harvest": harvest | {"compressor": "auto" if automatic else source.input_compressor},
    }


def claim(run_dir: Path, settings: Settings, manifest: Manifest, used: dict[str, Any]) -> None:
    """Make the run directory, which `refuse_another` has let pass, this run's own; `used`: see `Recipe.used`."""
    record = {
        "settings": trained_with(settings, manifest.source),
        "harvest_fingerprint": manifest.fingerprint,
        "d_in": manifest.source.d_in,
        "used": used,
    }
    write_whole(run_dir / FILE_NAME, (json.dumps(record, indent=1) + "\n").encode())


def refuse_another(run_dir: Path, settings: Settings, fingerprint: str | None) -> None:
    """Raise `InputError` when the directory's run has other settings or another harvest, or is not of this project.

    More `train.rows` than before continue the same run. A run without a checkpoint may be begun anew with any settings.
    """
    file = run_dir / FILE_NAME
    if not file.exists():
        if (run_dir / weights.FILE_NAME).exists():
            raise InputError(
                f"{run_dir}: holds a transcoder that was not trained here; give another name (RUN=name)"
            )
        return
    if not (run_dir / weights.FILE_NAME).exists() and latest(run_dir) is None:
        return  # it has learned nothing that would be kept: begun anew
    record = read(run_dir)
    old, new = (identity(each, record.d_in) for each in (record.settings, settings))
    if new["train.rows"] >= old["train.rows"]:
        old["train.rows"] = new["train.rows"]
    differing = [
        f"{key} was {_spelt(key, old[key])}, asked {_spelt(key, new[key])}"
        for key in new
        if old[key] != new[key]
    ]
    if fingerprint is not None and record.fingerprint != fingerprint:
        differing.append(f"harvest was {shown(record.fingerprint)}, is {shown(fingerprint)}")
    if differing:
        raise InputError(
            f"{run_dir}: holds a run with other settings: {'; '.join(differing)}; "
            "give another name (RUN=name), or remove the directory"
        )


def _spelt(key: str, value: Any) -> Any:
    """A value as the command line takes it."""
    if value is None:
        return "auto" if key in ("train.lr", "train.min_lr") else "none"
    return value


class Begun(NamedTuple):
    """What a run says of itself from its beginning on."""

    settings: Settings
    fingerprint: str
    """Of the harvest."""
    d_in: int
    used: dict[str, Any]
    """What it used where settings say "auto", see `Recipe.used`; older runs lack some of it."""


def read(run_dir: Path) -> Begun:
    """The record of the run that was begun in a directory; `InputError` where there is none, or a damaged one."""
    file = run_dir / FILE_NAME
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        settings = validated(record["settings"], "written by another version")
        used = dict(record.get("used") or {})
        return Begun(settings, str(record["harvest_fingerprint"]), int(record["d_in"]), used)
    except FileNotFoundError:
        raise InputError(f"{run_dir}: no run was started here; train it first (make train)") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read: {error}; give another name (RUN=name), or remove {run_dir}"
        ) from error


def latest(run_dir: Path) -> Path | None:
    """Directory of the newest whole checkpoint; none when the run has none yet.

    Raises `InputError` when the pointer is damaged or leads out of the run.
    """
    pointer = run_dir / weights.CHECKPOINT
    if not pointer.is_file():
        return None
    name = pointer.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"step_\d+", name):
        raise InputError(f"{pointer}: expected step_N, found {name!r:.80}; {afresh(run_dir)}")
    return inside(pointer.parent, name)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(folder.name.removeprefix("step_"))


def afresh(run_dir: Path) -> str:
    """What to do with a run whose checkpoint cannot be used."""
    return f"remove {run_dir}{os.sep} to train again from the start"


def stopped(run_dir: Path) -> str | None:
    """Where a run without finished weights stands, in words; none where it has them, or none was begun."""
    if (run_dir / weights.FILE_NAME).exists() or not (run_dir / FILE_NAME).exists():
        return None
    train, newest = read(run_dir).settings.train, latest(run_dir)
    where = "before its first checkpoint" if newest is None else f"at step {step_of(newest)}"
    return f"interrupted, or still training, {where} of {train.rows // train.batch_size:,}"


def refuse_unfinished(run_dir: Path) -> None:
    """Raise `InputError` where a run has no weights yet, saying how far it is."""
    if stands := stopped(run_dir):
        raise InputError(
            f"{run_dir}: {stands}; its weights are written when it ends: rerun the same make train to continue; "
            "make evaluate ARGS='--evaluate.checkpoint true' evaluates the checkpoint"
        )


def went_on(run_dir: Path) -> int | None:
    """Step of a checkpoint that is later than the finished weights: a run of more rows that is not at its end."""
    training, newest = weights.read_metadata(run_dir).get("training"), latest(run_dir)
    if training is None or newest is None or step_of(newest) <= training["steps"]:
        return None
    return step_of(newest)


def finished(run_dir: Path, settings: Settings, fingerprint: str | None) -> dict[str, Any] | None:
    """Metadata of the finished weights when they are just what is asked for.

    Raises `InputError` when they are of another harvest than the store with this fingerprint, or of other settings.
    Without a fingerprint (the store is gone) the harvest is not compared.
    """
    if not (run_dir / weights.FILE_NAME).exists() or not (run_dir / FILE_NAME).exists():
        return None
    refuse_another(run_dir, settings, fingerprint)
    weights.refuse_another_model(run_dir, settings)
    metadata = weights.read_metadata(run_dir)
    trained = validated(metadata["settings"], str(run_dir / weights.FILE_NAME)).train
    return metadata if trained.rows == settings.train.rows else None


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide a run, by name."""
    return {name: version(name) for name in ("torch", "safetensors", "numpy")}


@cache
def git_commit() -> str | None:
    """Commit of the project's working tree, "+" when it has changes; none outside a repository."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip()
