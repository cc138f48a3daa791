"""Neuronpedia's folder: the fields of its database, and what the latents do."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import InputError
from evaluate.handover import neuronpedia
from evaluate.handover.neuronpedia import Names, export_neuronpedia
from evaluate.run import evaluate
from shards import Store
from tests.evaluate.runs import D_OUT, ENDS, make_run, settings_of
from transcoder import Transcoder

Line = dict[str, Any]
SCHEMA = {
    "release": "name! visibility isNewUi featured description! descriptionShort urls creatorEmail creatorName! "
    "creatorNameShort creatorId! defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt",
    "model": "id! displayNameShort displayName creatorId! tlensId openRouterId dimension thinking visibility "
    "defaultSourceSetName defaultSourceId defaultGraphSourceSetName inferenceEnabled instruct layers! "
    "neuronsPerLayer! createdAt owner! updatedAt website",
    "sourceset": "modelId! name! hasDashboards allowInferenceSearch visibility description! type creatorName! urls "
    "creatorEmail creatorId! releaseName hasGraphs graphEnabled similarityMatrixEnabled defaultOfModelId "
    "defaultGraphModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap createdAt",
    "source": "id! modelId! hasDashboards inferenceEnabled saelensConfig saelensRelease saelensSaeId hfRepoId "
    "hfFolderId visibility defaultOfModelId setName! creatorId! hasUmap hasUmapLogSparsity hasUmapClusters num_prompts "
    "num_tokens_in_prompt dataset notes cosSimMatchModelId cosSimMatchSourceId createdAt",
    "features": "modelId! layer! index! sourceSetName creatorId createdAt maxActApprox hasVector vector vectorLabel "
    "vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices "
    "neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson "
    "correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str "
    "neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
    "logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist umap_cluster "
    "umap_log_feature_sparsity umap_x umap_y",
    "activations": "id! tokens! dataIndex index! layer! modelId! dataSource maxValue! maxValueTokenIndex! minValue! "
    "values! dfaValues dfaTargetIndex dfaMaxValue zQIndices zKIndices zValues creatorId! createdAt lossValues "
    "logitContributions binMin binMax binContains qualifyingTokenIndex",
    "explanations": "id! modelId! layer! index! embedding description! authorId! triggeredByUserId notes scoreV1 "
    "scoreV2 umap_x umap_y umap_cluster umap_log_feature_sparsity typeName explanationModelName createdAt updatedAt",
}
"""Columns of prisma/schema.prisma at hijohnnylin/neuronpedia ebb8426fc550ad5d1f76d52c271a624af3c08a57; !: must be given
(no default, not nullable; the ids' default is Prisma's, and lines of features and the like do not go through it)."""
TEXTS = {
    *(
        "name",
        "description",
        "descriptionShort",
        "creatorName",
        "creatorNameShort",
        "creatorId",
        "authorId",
        "owner",
    ),
    *(
        "id",
        "modelId",
        "setName",
        "sourceSetName",
        "layer",
        "index",
        "visibility",
        "hookName",
        "notes",
        "dataset",
    ),
    *("releaseName", "displayName", "displayNameShort"),
}
WHOLE = {
    *("layers", "neuronsPerLayer", "dimension", "num_prompts", "num_tokens_in_prompt"),
    *("maxValueTokenIndex", "qualifyingTokenIndex"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neuronpedia")
    make_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.run.draw", lambda *_: [])  # plots take seconds
        evaluate(settings_of(folder), ce_tokens=0)
    said = [{"layer": 0, "latent": 3, "label": "colours", "score": 0.75, "source": "gpt"}]
    (settings_of(folder).run_dir() / "labels.json").write_text(json.dumps(said))
    explained = "layer,latent,label,score,source\n0,3,red and blue,0.5,llm\n0,4,names,,llm\n"
    (settings_of(folder).run_dir() / "explanations.csv").write_text(explained)
    return folder


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    folder = export_neuronpedia(settings_of(root))
    assert folder == settings_of(root).run_dir() / "export" / "neuronpedia"
    return folder / "tiny" / "0-tiny"


def lines(source: Path, table: str) -> list[Line]:
    batches = sorted((source / table).glob("batch-*.jsonl.gz"))
    return [json.loads(line) for path in batches for line in gzip.decompress(path.read_bytes()).splitlines()]


def all_lines(source: Path) -> Iterator[tuple[str, list[Line]]]:
    for table in SCHEMA:
        single = source / f"{table}.jsonl"
        yield table, [json.loads(single.read_text())] if single.is_file() else lines(source, table)


def test_fields_are_those_of_the_importers_schema(source: Path) -> None:
    for table, found in all_lines(source):
        names = SCHEMA[table].split()
        known, needed = {name.rstrip("!") for name in names}, {name[:-1] for name in names if name[-1] == "!"}
        assert found
        for line in found:
            assert list(line) == list(found[0])  # the importer takes the columns of the first line
            assert needed <= line.keys() <= known
            assert all(isinstance(line[name], str) for name in TEXTS & line.keys())
            assert all(type(line[name]) is int for name in WHOLE & line.keys())


def test_tables_refer_to_each_other(source: Path) -> None:
    """Foreign keys of the database: a line whose other side is not there cannot be inserted."""
    table = dict(all_lines(source))
    model, sourceset, its = table["model"][0], table["sourceset"][0], table["source"][0]
    assert model["id"] == sourceset["modelId"] == its["modelId"] == "tiny"
    assert sourceset["releaseName"] == table["release"][0]["name"]
    assert its["setName"] == sourceset["name"]
    assert its["id"] == f"0-{sourceset['name']}"  # lib/utils/source.ts splits it at the first hyphen
    features = {(line["modelId"], line["layer"], line["index"]) for line in table["features"]}
    assert features == {("tiny", "0-tiny", str(f)) for f in range(ENDS[-1])}
    for name in ("activations", "explanations"):
        assert {(line["modelId"], line["layer"], line["index"]) for line in table[name]} <= features
        assert len({line["id"] for line in table[name]}) == len(table[name])
        assert all(re.fullmatch("c[0-9a-f]{24}", line["id"]) for line in table[name])


def test_a_feature_is_what_the_latent_does(root: Path, source: Path) -> None:
    settings = settings_of(root)
    heldout, coder = Store.of(settings).heldout, Transcoder.load(settings.run_dir())
    acts = coder.encode(heldout.rows(0, len(heldout))[0])
    activations = lines(source, "activations")
    for f, feature in enumerate(lines(source, "features")):
        own = acts[:, f]
        most = float(own.max())
        assert feature["maxActApprox"] == pytest.approx(most, rel=1e-4)
        assert feature["frac_nonzero"] == pytest.approx(float((own > 0).double().mean()))
        assert feature["vector"] == pytest.approx(coder.W_dec[f].tolist(), rel=1e-4)
        assert (len(feature["vector"]), feature["hookName"]) == (D_OUT, "blocks.0.hook_mlp_out")
        heights, middles = feature["freq_hist_data_bar_heights"], feature["freq_hist_data_bar_values"]
        assert sum(heights) == min(int((own > 0).sum()), 256)
        assert middles[0] == pytest.approx(most / 48, rel=1e-3)
        assert middles[-1] == pytest.approx(most - most / 48, rel=1e-3)
        samples = [line for line in activations if line["index"] == str(f)]
        top = [line for line in samples if line["binMin"] == -1]
        assert top[0]["maxValue"] == pytest.approx(most, rel=1e-4)
        assert all((line["binMax"], line["binContains"]) == (feature["maxActApprox"], -1) for line in top)
        rest = [line for line in samples if line["binMin"] >= 0]
        assert len(rest) == 8
        shares = {line["binMin"]: line["binContains"] for line in rest}
        for line in rest:
            value = line["values"][line["qualifyingTokenIndex"]]
            assert line["binMin"] * 0.9999 <= value <= line["binMax"] * 1.0001
            assert line["binMax"] - line["binMin"] == pytest.approx(most / 4, rel=1e-3)
            quarter = round(line["binMin"] / most * 4)
            counted = sum(heights[6 * quarter : 6 * quarter + 6]) / sum(heights)
            assert shares[line["binMin"]] == pytest.approx(counted, rel=1e-4)
        for line in samples:
            assert len(line["tokens"]) == len(line["values"])
            assert line["maxValue"] == max(line["values"]) == line["values"][line["maxValueTokenIndex"]]


def test_labels_become_explanations(source: Path) -> None:
    explanations = lines(source, "explanations")
    own = [line for line in explanations if line["index"] == "3"]
    assert (own[0]["description"], own[0]["notes"]) == ("colours", "gpt; score 0.75")
    assert (own[1]["description"], own[1]["notes"]) == ("red and blue", "llm; score 0.5")
    assert own[2]["description"].startswith("fires on word")
    assert re.fullmatch(r"the words it fires on; precision 0\.\d\d, recall 0\.\d\d", own[2]["notes"])
    assert next(line["description"] for line in explanations if line["index"] == "4") == "names"
    assert len(explanations) == ENDS[-1] + 3
    assert len({line["id"] for line in explanations}) == len(explanations)


def test_a_prefix_has_its_own_latents_and_frequencies(root: Path) -> None:
    settings = settings_of(root)
    source = export_neuronpedia(settings, prefix=0) / "tiny" / "0-tiny_prefix_0"
    heldout, coder = Store.of(settings).heldout, Transcoder.load(settings.run_dir()).prefix(0)
    density = (coder.encode(heldout.rows(0, len(heldout))[0]) > 0).double().mean(0)
    found = [line["frac_nonzero"] for line in lines(source, "features")]
    assert found == pytest.approx(density.tolist())


def test_the_same_run_gives_the_same_bytes(root: Path, source: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    export_neuronpedia(settings_of(root))
    assert {path.name: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_batches_have_1024_latents_each(tmp_path: Path) -> None:
    batches = neuronpedia._Batches(tmp_path / "features")
    batches.add(0, [])
    assert not (tmp_path / "features").exists()
    for latent in (0, 1023, 1024, 3000):
        batches.add(latent, [{"index": str(latent)}])
    batches.close()
    found = {
        path.name: gzip.decompress(path.read_bytes()) for path in sorted((tmp_path / "features").iterdir())
    }
    assert found == {
        "batch-0.jsonl.gz": b'{"index":"0"}\n{"index":"1023"}\n',
        "batch-1.jsonl.gz": b'{"index":"1024"}\n',
        "batch-2.jsonl.gz": b'{"index":"3000"}\n',
    }


def test_what_was_not_evaluated_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    make_run(tmp_path)
    expected = "neuronpedia: layer 0: not evaluated; make evaluate LAYER=0 RUN=tiny, and export again"
    with pytest.raises(InputError, match=re.escape(expected)):
        export_neuronpedia(settings_of(tmp_path))
    assert not (settings_of(tmp_path).run_dir() / "export").exists()


def test_identifiers_differ_between_layers_and_runs() -> None:
    ids = {
        Names(*each).identifier("activation", 1, 2) for each in (("m", "a", 1), ("m", "a", 2), ("m", "b", 1))
    }
    assert len(ids) == 3
