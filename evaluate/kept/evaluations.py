"""Where the evaluations of a run are, side by side.

<run>/evaluation is of the held-out rows of the store that the run was trained on. Every other one (train rows, another
harvest, fewer rows or tokens) is in <run>/evaluations, in a folder named after what it is of. One takes another's place
only if it says all of it: measured anew on the same rows, or with the cross-entropy that the other one is without.
"""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from common.errors import InputError
from evaluate.files import METRICS_VERSION, Asked, Done, complete, damaged, finished
from evaluate.records import BaselineMetrics, Metrics, Provenance, Results

MAIN, OTHERS = "evaluation", "evaluations"
GUESTS = ("probes.json",)
"""What other stages measured of the same weights on the same rows, and left beside metrics.json."""


class Evaluation(NamedTuple):
    """A complete evaluation, and where it is."""

    folder: Path
    metrics: Metrics

    @property
    def tokens(self) -> int:
        """Tokens of its cross-entropy, 0 where that was not measured."""
        measured = self.metrics.cross_entropy.skipped is None
        return self.metrics.provenance.cross_entropy_tokens if measured else 0

    @property
    def size(self) -> tuple[int, int]:
        """Of two of the same rows' beginning, the larger one is shown: by rows, then by tokens of the cross-entropy."""
        return self.metrics.rows, self.tokens


def folders(run_dir: Path) -> list[Path]:
    """Where an evaluation of the run may be: the main one first."""
    return [run_dir / MAIN, *sorted((run_dir / OTHERS).glob("*/"))]


def evaluation_on(run_dir: Path, weights_sha256: str, store_fingerprint: str, split: str) -> Path:
    """Folder of the largest evaluation, of any version, of these weights on just these rows; else the main one's."""
    sizes: dict[tuple[int, int], Path] = {}
    for folder in folders(run_dir):
        evaluation = Done.model_validate(complete(folder) or {})
        of = evaluation.provenance or Asked()
        if (of.weights_sha256, *_text(of)) == (weights_sha256, store_fingerprint, split):
            sizes.setdefault((of.rows, evaluation.tokens), folder)
    return sizes[max(sizes)] if sizes else run_dir / MAIN


def beside(run_dir: Path, of: Provenance, own: bool) -> Path:
    """Folder for what another stage measures of these weights on these rows (`GUESTS`): beside the largest evaluation
    on them, and where there is none yet, where one would be; `own` as in `place`.
    """
    folder = evaluation_on(run_dir, of.weights_sha256, of.store_fingerprint, of.split)
    there = Done.model_validate(complete(folder) or {}).provenance
    known = there is not None and (there.weights_sha256, *_text(there)) == (of.weights_sha256, *_text(of))
    return folder if known or own else _beside(run_dir, {"provenance": of.written()})


There = Sequence[tuple[Path, Mapping[str, object]]]
"""The complete evaluations of a run, of any version: folder, and its metrics.json. The main one is the first."""


def read_all(run_dir: Path) -> There:
    """All evaluations of a run; raises `InputError` naming a metrics.json that cannot be read."""
    return [(folder, values) for folder in folders(run_dir) if (values := complete(folder)) is not None]


def main_evaluation(run_dir: Path, weights_sha256: str | None = None) -> Path:
    """Folder of the evaluation that other stages use: the main one; if there is none (of these weights), another one,
    of train rows last; the main one's folder if there is none at all.
    """
    for folder in folders(run_dir):
        of = Done.model_validate(complete(folder) or {}).provenance
        if of is not None and weights_sha256 in (None, of.weights_sha256):
            return folder
    return run_dir / MAIN


def digests_of(run_dir: Path) -> set[str]:
    """Digests of the weights that the run's complete evaluations, of any version, are of."""
    found = (Done.model_validate(values).provenance or Asked() for _, values in read_all(run_dir))
    return {of.weights_sha256 for of in found}


def find(there: There, provenance: Provenance) -> Evaluation | None:
    """The evaluation of exactly this provenance, in whichever folder; None if there is none.

    One that lacks a field of this version is ignored, so it is measured again; so is one with a damaged file, after a
    line on standard error.
    """
    for folder, values in there:
        if values["provenance"] != provenance.written():
            continue
        if cut := damaged(folder, values):
            print(f"{folder / cut[0]}: damaged or incomplete: the run is measured again", file=sys.stderr)
            continue
        with suppress(ValidationError):
            return Evaluation(folder, Metrics.model_validate(values))
    return None


def of_weights(there: There, weights_sha256: str) -> list[Evaluation]:
    """Every evaluation of these weights that this version has made: the main one first."""
    found: list[Evaluation] = []
    for folder, values in there:
        of = Done.model_validate(values).provenance or Asked()
        if (of.weights_sha256, of.metrics_version) == (weights_sha256, METRICS_VERSION):
            with suppress(ValidationError):
                found.append(Evaluation(folder, Metrics.model_validate(values)))
    return found


def beside_a_larger(there: There, metrics: Metrics) -> tuple[int, int] | None:
    """Size of an evaluation that has a larger one of the same weights, split and store beside it; None without one."""
    size = Evaluation(Path(), metrics).size
    others = of_weights(there, metrics.provenance.weights_sha256)
    sizes = [each.size for each in others if _text(each.metrics.provenance) == _text(metrics.provenance)]
    return size if max(sizes, default=size) > size else None


def with_language(there: There, provenance: Provenance) -> Evaluation | None:
    """The evaluation whose cross-entropy is that of `provenance`: of the same weights and split, of whichever rows.

    Of just as many tokens; where none were requested, of the most that there are.
    """
    wanted = provenance.cross_entropy_tokens
    found = [
        each
        for each in of_weights(there, provenance.weights_sha256)
        if _text(each.metrics.provenance) == _text(provenance) and each.tokens and wanted in (0, each.tokens)
    ]
    return max(found, key=lambda each: each.tokens, default=None)


def _text(of: Provenance | Asked) -> tuple[str, str | None]:
    return of.store_fingerprint, of.split


def baselines_before(runs: Path, provenance: Provenance) -> BaselineMetrics | None:
    """The mean and the linear map as any run below `runs` was measured beside them, on the same rows of this store."""
    wanted = (*_text(provenance), provenance.rows)
    for folder in (each for run_dir in sorted(runs.glob("*/")) for each in folders(run_dir)):
        with suppress(InputError):  # of another version, or damaged: it was looked at, not asked for
            metrics = finished(folder)
            of = metrics and metrics.provenance
            if metrics and of and (*_text(of), of.rows) == wanted and metrics.baselines.linear:
                return metrics.baselines
    return None


def place(run_dir: Path, results: Results, own: bool) -> Path:
    """The folder of an evaluation; `own`: it is of the held-out rows of the run's own store.

    Of several such, the main one is the largest: a quick look at fewer rows does not take its place.
    """
    main, values = run_dir / MAIN, results.written()
    if not own:
        return _beside(run_dir, values)
    there = complete(main)
    if there is None:
        return main
    old, new = Done.model_validate(there), Done.model_validate(values)
    assert old.provenance is not None, "a complete evaluation has a provenance"
    assert new.provenance is not None
    same = {"weights_sha256", "metrics_version", "store_fingerprint", "split"}
    alike = old.provenance.model_dump(include=same) == new.provenance.model_dump(include=same)
    larger = (old.provenance.rows, old.tokens) > (new.provenance.rows, new.tokens)
    return _beside(run_dir, values) if alike and larger else main


def _beside(run_dir: Path, values: Mapping[str, object]) -> Path:
    """Where an evaluation is that is not the main one: named after what it is of."""
    evaluation = Done.model_validate(values)
    of = evaluation.provenance or Asked()
    store = re.sub(r"[^0-9a-zA-Z]", "_", of.store_fingerprint[:8])  # it comes from a manifest
    return run_dir / OTHERS / f"{of.split}-{of.rows}_rows-{evaluation.tokens}_tokens-{store}"


def make_room(folder: Path, results: Results) -> None:
    """Keep a complete evaluation that is in the main `folder`, and of something else than the `results` to be there.

    The caller holds the run's lock. Other folders are named after what they are of.
    """
    there = complete(folder) if folder.name == MAIN else None
    if there is None or _answered(there, results.written()):
        return
    kept = _beside(folder.parent, there)
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(exist_ok=True)
    folder.replace(kept)
    print(f"the evaluation that was in {folder} is kept in {kept}", file=sys.stderr)


def _answered(old: Mapping[str, object], new: Mapping[str, object]) -> bool:
    """Whether an evaluation says all that an older one does: of the same rows, and of the same tokens or of some where
    that one is of none."""
    before, after = Done.model_validate(old), Done.model_validate(new)
    a, b = before.provenance or Asked(), after.provenance or Asked()
    return (*_text(a), a.rows) == (*_text(b), b.rows) and before.tokens in (0, after.tokens)


def settle(evaluation: Evaluation, folder: Path) -> Evaluation:
    """Move an evaluation to its folder, out of one where an older version, or a kill, has left it."""
    if evaluation.folder == folder:
        return evaluation
    make_room(folder, evaluation.metrics)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    evaluation.folder.replace(folder)
    return Evaluation(folder, evaluation.metrics)


def remove_answered(run_dir: Path, own: Evaluation) -> None:
    """Remove what is beside an evaluation that says all of it: the same rows without the cross-entropy, or older."""
    for folder, values in read_all(run_dir):
        if folder != own.folder and _answered(values, own.metrics.written()):
            for guest in GUESTS:
                if (folder / guest).exists() and not (own.folder / guest).exists():
                    (folder / guest).replace(own.folder / guest)
            shutil.rmtree(folder)
