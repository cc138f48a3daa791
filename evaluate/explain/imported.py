"""Explanations that other tools made, as explanations.csv.

delphi: its results folder, explanations/<module>_latent<N>.txt, each a JSON string, and scores/<scorer>/ with a file of
the same name, a JSON list of judged examples (delphi/__main__.py, delphi/scorers/classifier/sample.py).
Neuronpedia: JSON or JSON lines, also .gz: objects with modelId, layer ("12-name"), index, description,
explanationModelName and scores, or features that hold such objects in `explanations` (its API and its exports).
Any other: a table of layer, latent, label, and score and source (evaluate/notes.py), of several layers too.
"""

import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line, shown
from common.files import sha256
from common.settings import Settings
from evaluate.explain.scores import mean_of, score_of
from evaluate.explain.write import as_note, write_explanations
from evaluate.notes import Note, note_in, of_weights, table_rows, whole
from evaluate.subject import refuse_missing
from transcoder.weights import FILE_NAME, read_metadata

NAME = re.compile(r"(.*)_latent(\d{1,9})\.txt")
LAYER = re.compile(r"(?:layers|h|blocks|layer)[._](\d+)(?!\d)")
NONE_MADE = ("explanation could not be parsed.", "no explanation found")
"""What delphi writes where it has none."""
Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""Where each object or line is, and its values."""


@dataclass(frozen=True)
class Brought:
    """What was read and what was not."""

    csv: Path
    explanations: int
    scored: int
    left_out: Mapping[str, int]


@dataclass
class _Found:
    notes: dict[int, Note]
    left_out: Counter[str]

    def add(
        self, latent: int, n_latents: int, where: str, label: str, score: float | None, source: str
    ) -> None:
        """Of several explanations of a latent, the one with the best score; of equal ones the first."""
        if latent >= n_latents:
            raise InputError(
                f"{where}: expected latents 0 to {n_latents - 1}, found {latent}; it is of another run"
            )
        if not label.strip():
            self.left_out["without text"] += 1
            return
        note, before = as_note(label, score, source), self.notes.get(latent)
        if before is None or (score is not None and (before.score is None or score > before.score)):
            self.notes[latent] = note
        self.left_out["second explanations of a latent"] += before is not None


def bring(settings: Settings, source: Path) -> Brought:
    """Read what is at `source` into the run's explanations.csv.

    Raises `InputError` for what is neither tool's, and where none of it is of this layer.
    """
    run_dir, layer = settings.run_dir(), settings.layer
    refuse_missing(run_dir)
    n_latents = read_metadata(run_dir)["prefix_ends"][-1]
    if not source.exists():
        raise InputError(
            f"{source}: not found; give delphi's results folder, a file of Neuronpedia's explanations, or a table "
            "(.csv, .tsv, .json)"
        )
    digest = sha256(run_dir / FILE_NAME)
    if source.is_dir():
        found = _delphi(source, layer, n_latents)
    elif source.suffix.lower() in (".csv", ".tsv"):
        found = _table(source, table_rows(source), layer, n_latents, digest)
    else:
        objects = _explanations(source)
        first = [*itertools.islice(objects, 1)]
        rows = itertools.chain(first, objects)
        if first and {"latent", "label"} <= first[0][1].keys():
            found = _table(source, rows, layer, n_latents, digest)
        else:
            found = _neuronpedia(source, rows, layer, n_latents)
    if not found.notes:
        raise InputError(f"{source}: holds no explanation of layer {layer} ({_reasons(found.left_out)})")
    csv = write_explanations(run_dir, layer, n_latents, digest, found.notes)
    scored = sum(note.score is not None for note in found.notes.values())
    return Brought(csv, len(found.notes), scored, +found.left_out)


def _reasons(left_out: Counter[str]) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in (+left_out).items()) or "none at all"


# -- tables --------------------------------------------------------------------------------------------


def _table(path: Path, rows: Rows, layer: int, n_latents: int, weights_sha256: str) -> _Found:
    found = _Found({}, Counter())
    for place, values in rows:
        try:
            if whole("layer", values.get("layer")) != layer:
                found.left_out["of other layers"] += 1
                continue
            latent, note = note_in(values, layer, n_latents)
        except ValueError as error:
            raise InputError(f"{path}: {place}: {error}") from error
        if of_weights(values, lambda: weights_sha256):
            found.add(latent, n_latents, f"{path}: {place}", note.label, note.score, note.source or path.stem)
        else:
            found.left_out["of other weights"] += 1
    return found


# -- delphi --------------------------------------------------------------------------------------------


def _delphi(folder: Path, layer: int, n_latents: int) -> _Found:
    found = _Found({}, Counter())
    texts = folder / "explanations" if (folder / "explanations").is_dir() else folder
    files = [(path, match) for path in sorted(texts.glob("*.txt")) if (match := NAME.fullmatch(path.name))]
    if not files:
        raise InputError(f"{texts}: expected delphi's files <module>_latent<N>.txt, found none")
    own = {match[1] for _, match in files if (number := LAYER.search(match[1])) and int(number[1]) == layer}
    if len(own) > 1:
        raise InputError(
            f"{texts}: expected explanations of one module of layer {layer}, found {', '.join(sorted(own))}; give a "
            "folder with those of one"
        )
    source = _explainer(texts.parent)
    for path, match in files:
        number = LAYER.search(match[1])
        if number is None:
            raise InputError(
                f"{path}: expected a module with its layer's number, such as layers.12.mlp, found {match[1]}"
            )
        if int(number[1]) != layer:
            found.left_out["of other layers"] += 1
            continue
        text = _json(path, path.read_bytes())
        if not isinstance(text, str):
            raise InputError(f"{path}: expected a JSON string, found {shown(text)}")
        if text.strip().lower() in NONE_MADE:
            found.left_out["without text"] += 1
            continue
        scores = [_delphi_score(each) for each in sorted((texts.parent / "scores").glob(f"*/{path.name}"))]
        found.add(int(match[2]), n_latents, str(path), text, mean_of(scores).mean, source)
    return found


def _explainer(results: Path) -> str:
    """The model that explained, where delphi's own settings are beside its results."""
    file = results / "run_config.json"
    config = _json(file, file.read_bytes()) if file.is_file() else {}
    model = config.get("explainer_model") if isinstance(config, dict) else None
    return model if isinstance(model, str) and model else "delphi"


def _delphi_score(path: Path) -> float | None:
    """Balanced accuracy over the examples that were judged; none for another kind of scorer."""
    examples = _json(path, path.read_bytes())
    if not isinstance(examples, list):
        return None
    pairs: list[tuple[bool, bool]] = []
    for each in examples:
        if not isinstance(each, dict) or "activating" not in each or "prediction" not in each:
            return None
        truth, said = each["activating"], each["prediction"]
        if not isinstance(truth, bool) or not isinstance(said, bool | None):
            return None
        if said is not None:
            pairs.append((truth, said))
    return score_of(pairs).score


# -- Neuronpedia ---------------------------------------------------------------------------------------


def _neuronpedia(path: Path, objects: Rows, layer: int, n_latents: int) -> _Found:
    found = _Found({}, Counter())
    for place, each in objects:
        where = f"{path}: {place}"
        lacking = [key for key in ("layer", "index", "description") if key not in each]
        if lacking:
            raise InputError(
                f"{where}: no key {lacking[0]}; expected Neuronpedia's explanations (layer, index, description) "
                "or a table with layer, latent and label"
            )
        number = re.match(r"(\d{1,9})(?!\d)", str(each["layer"]))
        index = re.fullmatch(r"\d{1,9}", str(each["index"]))
        if number is None or index is None:
            wrong, value = ("layer", each["layer"]) if number is None else ("index", each["index"])
            raise InputError(f"{where}: {wrong}: expected a number first, found {shown(value)}")
        if int(number[1]) != layer:
            found.left_out["of other layers"] += 1
            continue
        label = each["description"] if isinstance(each["description"], str) else ""
        source = each.get("explanationModelName") or each.get("typeName") or "Neuronpedia"
        found.add(int(index[0]), n_latents, where, label, _neuronpedia_score(each), str(source))
    return found


def _neuronpedia_score(explanation: Mapping[str, Any]) -> float | None:
    """Mean of its scores' values."""
    scores = explanation.get("scores")
    values = (
        [each.get("value") for each in scores if isinstance(each, dict)] if isinstance(scores, list) else []
    )
    return mean_of(float(each) for each in values if isinstance(each, int | float) and abs(each) < 1e9).mean


def _explanations(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every explanation in a file, and where it is: alone, or below the feature that it is of."""
    for place, value in _objects(path):
        if not isinstance(value, dict):
            raise InputError(f"{path}: {place}: expected an object, found {shown(value)}")
        inner = value.get("explanations")
        if isinstance(inner, list):
            feature = {key: value[key] for key in ("layer", "index") if key in value}
            for each in inner:
                if isinstance(each, dict):
                    yield place, feature | each
        else:
            yield place, value


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a whole .gz file: {first_line(error)}") from error
    if ".jsonl" in path.suffixes:
        for number, line in enumerate(data.splitlines(), 1):
            if line.strip():
                yield f"line {number}", _json(path, line, f"line {number}: ")
        return
    values = _json(path, data)
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        yield f"object {number}", value


def _json(path: Path, data: bytes, place: str = "") -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {place}not JSON: {first_line(error)}") from error
