"""circuit-tracer's feature pages: read as its page's script reads them, against dense activations."""

import gzip
import itertools
import json
import shutil
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.errors import InputError
from common.files import sha256
from common.settings import Settings
from common.tokens import TokenText
from evaluate.feature_pages import Evaluated, SetPages, write_layer
from evaluate.files import CONTEXTS, LATENTS, is_of, latents_of
from evaluate.labels.read import label_words
from evaluate.metrics.catalogue import tensors
from evaluate.metrics.contexts import REACH
from evaluate.run import evaluate
from shards import Store
from shards.store import read_tokenizer
from tests.evaluate.report.test_page import large_catalogue
from tests.evaluate.runs import ENDS, make_run, settings_of, tiny_transcoder
from transcoder import Transcoder
from transcoder.export import export_set
from transcoder.weights import FILE_NAME, save_tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    own = tiny_transcoder()
    b_enc = own.b_enc.clone()
    b_enc[7] = -50  # never fires
    make_run(folder, replace(own, parameters=replace(own.parameters, b_enc=b_enc)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.run.draw", lambda *_: [])  # plots take seconds
        evaluate(settings_of(folder), ce_tokens=0)
    return folder


def export(settings: Settings, prefix: int | None = None) -> Path:
    return export_set(settings, prefix, partial=True, add=SetPages(settings, prefix).write)


def pages_of(folder: Path, layer: int = 0) -> list[dict[str, Any]]:
    """Every page of a layer, as util.js' getFile reads it: four bytes of length, then so many of zlib."""
    index = json.loads(gzip.decompress((folder / "features" / "index.json.gz").read_bytes()))[str(layer)]
    data = (folder / "features" / index["filename"]).read_bytes()
    offsets, pages = index["offsets"], []
    assert (offsets[0], offsets[-1]) == (0, len(data))
    for start, end in itertools.pairwise(offsets):
        part = data[start : end + 1]  # the range it asks for has its last byte in it
        length = part[0] | part[1] << 8 | part[2] << 16 | part[3] << 24
        assert length == end - start - 4
        pages.append(json.loads(zlib.decompress(part[4 : 4 + length])))
    assert [page["index"] for page in pages] == list(range(len(pages)))
    return pages


def held_out(root: Path) -> tuple[Store, torch.Tensor, np.ndarray, np.ndarray]:
    """The store, every latent's activation on its rows [n, F], and the rows' contexts and positions."""
    settings = settings_of(root)
    store = Store.open(settings.store_path(0))
    n = len(store.heldout)
    acts = Transcoder.load(settings.run_dir()).encode(store.heldout.rows(0, n)[0])
    context, position = store.heldout.provenance(0, n)
    return store, acts, context.astype(int), position.astype(int)


def test_a_page_is_what_the_latent_does(root: Path) -> None:
    store, acts, context, position = held_out(root)
    text = TokenText(read_tokenizer(store.tokenizer_path))
    pages = pages_of(export(settings_of(root)))
    assert len(pages) == ENDS[-1]
    place = {pair: row for row, pair in enumerate(zip(context.tolist(), position.tolist(), strict=True))}
    for f in (0, 11, 23):
        page, own = pages[f], acts[:, f]
        firings = own[own > 0]
        assert page["act_min"] == 0
        assert page["act_max"] == pytest.approx(float(own.max()), rel=1e-4)
        assert page["activation_frequency"] == pytest.approx(float((own > 0).double().mean()))
        assert sum(page["histogram"]) == min(len(firings), 256)
        strongest = page["examples_quantiles"][0]
        label = " | ".join(label_words(settings_of(root).run_dir() / "evaluation", text)[f])
        assert strongest["quantile_name"] == f"fires on {label}; strongest contexts"
        assert label.startswith("word")
        example = strongest["examples"][0]
        row = int(own.argmax())
        at = example["train_token_ind"]
        assert example["tokens_acts_list"][at] == pytest.approx(float(own[row]), rel=1e-4)
        ids = store.heldout.contexts[context[[row]]][0]
        first = max(position[row] - 16, 0)
        assert example["tokens"] == text.pieces(ids[first : position[row] + 17].tolist())
        assert at == position[row] - first
        for n, value in enumerate(example["tokens_acts_list"]):  # the beginning of a context has no row
            expected = place.get((int(context[row]), first + n))
            assert value == pytest.approx(0 if expected is None else float(own[expected]), rel=1e-3)
        quarters = [each["quantile_name"] for each in page["examples_quantiles"][1:]]
        assert quarters == ["strongest quarter", "second quarter", "third quarter", "weakest quarter"]
        peaks = [
            e["tokens_acts_list"][e["train_token_ind"]]
            for q in page["examples_quantiles"][1:]
            for e in q["examples"]
        ]
        assert peaks == sorted(peaks, reverse=True)
        assert len(peaks) == 8


def test_a_persons_label_heads_the_page(root: Path) -> None:
    said = settings_of(root).run_dir() / "labels.json"
    said.write_text(json.dumps([{"layer": 0, "latent": f, "label": "red"} for f in (7, 11)]))
    try:
        pages = pages_of(export(settings_of(root)))
    finally:
        said.unlink()
    heads = [page["examples_quantiles"][0]["quantile_name"] for page in pages]
    assert heads[7] == "red; fires on none of 1,500 rows"
    assert heads[11].startswith("red; fires on ")
    assert heads[11].endswith("; strongest contexts")
    assert [f for f, head in enumerate(heads) if "red;" in head] == [7, 11]


def test_a_page_says_that_its_promoted_tokens_are_like_a_random_directions(root: Path) -> None:
    """Its format has no mark for the tokens themselves."""
    file = settings_of(root).run_dir() / "evaluation" / LATENTS
    before = file.read_bytes()
    columns = load_file(file)
    columns["effect_like_random"] = torch.arange(ENDS[-1]) == 11
    save_tensors(file, columns)
    try:
        pages = pages_of(export(settings_of(root)))
    finally:
        file.write_bytes(before)
    heads = [page["examples_quantiles"][0]["quantile_name"] for page in pages]
    assert heads[11].endswith("; promotes no more than a random direction might; strongest contexts")
    assert [f for f, head in enumerate(heads) if "random" in head] == [11]


def test_percentiles_and_a_dead_latent(root: Path) -> None:
    _, acts, _, _ = held_out(root)
    pages = pages_of(export(settings_of(root)))
    rare = min((f for f in range(ENDS[-1]) if f != 7), key=lambda f: int((acts[:, f] > 0).sum()))
    firings = acts[:, rare][acts[:, rare] > 0].numpy()
    assert 20 < len(firings) <= 256, "all are in the even sample"
    expected = np.percentile(firings, np.arange(1, 101), method="inverted_cdf")
    np.testing.assert_allclose(pages[rare]["quantile_values"], expected, rtol=1e-4)
    dead = pages[7]
    assert (dead["act_max"], dead["activation_frequency"], dead["top_logits"]) == (0, 0, [])
    assert dead["examples_quantiles"] == [{"quantile_name": "fires on none of 1,500 rows", "examples": []}]


def test_a_prefix_has_its_latents_and_its_frequencies(root: Path) -> None:
    store, *_ = held_out(root)
    settings = settings_of(root)
    pages = pages_of(export(settings, prefix=1))
    assert len(pages) == ENDS[1]
    narrow = Transcoder.load(settings.run_dir()).prefix(1)
    fires = narrow.encode(store.heldout.rows(0, len(store.heldout))[0]) > 0
    frequency = [page["activation_frequency"] for page in pages]
    np.testing.assert_allclose(frequency, fires.double().mean(0).numpy(), rtol=1e-6)


def two_layers(root: Path, folder: Path) -> Settings:
    """The same with a run of layer 1 that nobody has evaluated."""
    shutil.copytree(root, folder, dirs_exist_ok=True)
    settings = settings_of(folder).model_copy(update={"layers": ()})
    own = Transcoder.load(settings_of(folder).run_dir())
    source = own.metadata["source"] | {
        "layer": 1,
        "n_layers": 2,
        "input_hook": "blocks.1.ln2.hook_normalized",
        "output_hook": "blocks.1.hook_mlp_out",
    }
    replace(own, metadata=own.metadata | {"source": source}).save(
        settings_of(folder).run_dir().parents[1] / "layer_1" / "tiny"
    )
    return settings


def test_a_layer_without_evaluation_says_so_and_how_it_gets_pages(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index without it would make the tool show the latent before."""
    settings = two_layers(root, tmp_path)
    folder = export(settings)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no feature")]
    assert said == [
        "no feature pages of layers 1: not evaluated; make evaluate LAYER=1 RUN=tiny, and export again"
    ]
    assert pages_of(folder)[0]["examples_quantiles"][0]["examples"]
    pages = pages_of(folder, 1)
    assert len(pages) == ENDS[-1]
    assert pages[3]["examples_quantiles"] == [{"quantile_name": "layer 1: not evaluated", "examples": []}]


CASES = ["no evaluation", "another version", "no rows", "no store", "another harvest"]


@pytest.mark.parametrize("case", CASES)
def test_without_pages_the_set_is_exported_and_says_why(
    case: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    settings = settings_of(tmp_path)
    metrics = settings.run_dir() / "evaluation" / "metrics.json"
    values = json.loads(metrics.read_text())
    if case == "no evaluation":
        shutil.rmtree(metrics.parent)
    elif case == "no store":
        shutil.rmtree(settings.paths.activations)
    elif case == "no rows":  # of a version that did not note them: a traceback
        del values["provenance"]["rows"]
        metrics.write_text(json.dumps(values))
    else:
        key = {"another version": "metrics_version", "another harvest": "store_fingerprint"}[case]
        values["provenance"][key] = 1 if key == "metrics_version" else "0" * 64
        metrics.write_text(json.dumps(values))
    folder = export(settings)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "layer_0.safetensors"}
    (said,) = capsys.readouterr().err.splitlines()
    words = {
        "no evaluation": "not evaluated",
        "no store": "no store of their texts",
        "no rows": "another version",
    }.get(case, case)
    assert said.startswith("no feature pages of layers 0: ")
    assert words in said
    remedy = "make harvest LAYER=0" if case == "no store" else "make evaluate LAYER=0 RUN=tiny"
    assert said.endswith(f"; {remedy}, and export again")


def test_an_evaluation_of_other_weights_or_a_damaged_one_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("export"))
    settings = settings_of(tmp_path)
    folder = settings.run_dir() / "evaluation"
    whole = (folder / CONTEXTS).read_bytes()
    (folder / CONTEXTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"evaluation: damaged .*; remove it and evaluate layer 0 again"):
        export(settings)
    (folder / CONTEXTS).write_bytes(whole)
    own = Transcoder.load(settings.run_dir())
    digest = sha256(settings.run_dir() / FILE_NAME)
    assert is_of(folder, digest)
    assert not is_of(folder, digest[::-1])
    (tokens,) = latents_of(folder, "top_tokens")
    assert len(tokens) == ENDS[-1]
    with pytest.raises(InputError, match=r"latents.safetensors: damaged .*; remove .* and evaluate again"):
        latents_of(folder, "absent")
    replace(own, thresholds=own.thresholds + 0.1).save(settings.run_dir())
    with pytest.raises(InputError, match=r"is of other weights than .*LAYER=0 RUN=tiny\), or export without"):
        export(settings)
    assert not list(settings.run_dir().parents[1].glob("export/*/*"))


def test_logits_are_labels_and_the_memory_is_that_of_a_block(root: Path, tmp_path: Path) -> None:
    """The peak is that of a block of latents, whatever their number: 4.4 MB of 6,144 latents."""
    n_latents, length = 1536, 1024
    catalogue = large_catalogue(n_latents, 300, length)
    context, position = np.divmod(catalogue.samples.places, length)
    inside = context * length + np.clip(position, REACH, length - REACH - 1)  # its shades know no edge
    catalogue = replace(catalogue, samples=replace(catalogue.samples, places=inside))
    columns = {name: each.clone() for name, each in tensors(catalogue).items()}  # made up, some are one array
    save_tensors(tmp_path / LATENTS, columns)
    save_tensors(tmp_path / CONTEXTS, catalogue.samples.tensors(n_latents, length))
    contexts = np.random.default_rng(1).integers(2, 70, (300, length)).astype(np.int32)
    text = TokenText(read_tokenizer(Store.open(settings_of(root).store_path(0)).tokenizer_path))
    layer = Evaluated(3, tmp_path, 1000, contexts, text, {}, "heldout")
    tracemalloc.start()
    offsets = write_layer(tmp_path / "layer_3.bin", layer.pages())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(offsets) == n_latents + 1
    assert peak < 10e6
    data = (tmp_path / "layer_3.bin").read_bytes()[offsets[-2] :]
    page = json.loads(zlib.decompress(data[4:]))
    assert page["transcoder_id"] == "layer_3"
    for key, tokens in (("top", catalogue.effects.promoted), ("bottom", catalogue.effects.suppressed)):
        assert page[f"{key}_logits"] == [text.label(int(token)) for token in tokens[-1]]
