"""make model: the page of a set, what is measured again, what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluate.model.__main__ as command
from common.cli import run_stage
from common.errors import InputError
from common.files import locked
from common.settings import Settings
from evaluate.model import run
from evaluate.model.page import notes, spans
from evaluate.model.records import LayerMetrics, ModelMetrics, ReplacedMetrics
from evaluate.model.run import describe
from evaluate.model.summary import LIMITS, sufficient
from harvest.run import harvest
from shards import Store
from tests.evaluate.model.sets import (
    CLEAN,
    ENDS,
    LAYERS,
    RUN,
    arguments,
    increase_of,
    make_set,
    one,
    save_coder,
    save_evaluation,
    settings_at,
)
from tests.evaluate.report.test_page import Opened, browser  # noqa: F401
from tests.models import save_model
from transcoder.weights import FILE_NAME

TOKENS = 64


@pytest.fixture(scope="module")
def original(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with its page made; never changed."""
    root = tmp_path_factory.mktemp("set")
    describe(make_set(root, llama, corpus), TOKENS)
    return root


@pytest.fixture(scope="module")
def loaded(original: Path, llama: Path) -> Any:
    """The language model, loaded once."""
    settings = settings_at(original, llama, layer="0")
    return run.language_model(settings.model, Store.of(settings).manifest.source)


@pytest.fixture
def settings(
    original: Path, llama: Path, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Of a copy; its plots, 2 s, are not drawn again."""
    shutil.copytree(original, tmp_path / "set")
    monkeypatch.setattr(run, "draw_plots", lambda result, folder: [])
    monkeypatch.setattr(run, "language_model", lambda wanted, source: loaded)
    return settings_at(tmp_path / "set", llama)


def page_of(settings: Settings) -> str:
    return (settings.set_dir() / "model.html").read_text(encoding="utf-8")


def fail(*_: Any) -> Any:
    raise AssertionError("measured again")


def test_the_table_is_every_layers_own_evaluation(original: Path, llama: Path) -> None:
    settings = settings_at(original, llama)
    folder = settings.set_dir()
    result = ModelMetrics.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    assert [layer.layer for layer in result.layers] == list(LAYERS)
    for layer, found in zip(LAYERS, result.layers, strict=True):
        evaluation = one(settings, layer).run_dir() / "evaluation"
        own = json.loads((evaluation / "metrics.json").read_text())["prefixes"]
        for g, prefix in enumerate(found.prefixes):
            same = {"end", "fvu", "l0", "dead_fraction", "over_10_percent", "over_10_percent_fraction"}
            assert {key: prefix.written()[key] for key in same} == {key: own[g][key] for key in same}
            assert prefix.recovered_zero == own[g]["cross_entropy"]["recovered_zero"]
            assert prefix.increase == pytest.approx(increase_of(layer, g))
        assert (folder / found.report).resolve() == (evaluation / "report.html").resolve()
    assert {*result.files} == {path.name for path in folder.iterdir()} - {"model.json"}
    links = re.findall(r'<a href="(.*?)">', page_of(settings))
    assert links == [layer.report for layer in result.layers for _ in ENDS]


def test_all_replaced_is_measured_and_adds_up(original: Path, llama: Path) -> None:
    folder = settings_at(original, llama).set_dir()
    result = ModelMetrics.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    replaced = result.replaced
    assert isinstance(replaced, ReplacedMetrics)
    assert (replaced.contexts, replaced.positions) == (2, 2 * 31)
    for g, prefix in enumerate(replaced.prefixes):
        assert prefix.latents == 3 * ENDS[g]
        assert prefix.l0 == sum(2.0 + layer + g for layer in LAYERS)
        assert prefix.increase == prefix.cross_entropy - replaced.clean
        expected = (replaced.zero.cross_entropy - prefix.cross_entropy) / (
            replaced.zero.cross_entropy - replaced.clean
        )
        assert prefix.recovered_zero in (None, pytest.approx(expected))
    assert [(line.prefix, line.layer) for line in replaced.first.cumulative] == [
        (g, layer) for g in range(len(ENDS)) for layer in LAYERS
    ]
    assert [line.largest_difference for line in replaced.first.with_error_terms] == [0.0, 0.0]
    assert (replaced.first.contexts, replaced.first.positions) == (1, 31)


def test_nothing_is_measured_twice(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = settings.set_dir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(run, "_measure", fail)
    assert describe(settings, TOKENS)[1] is False
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    # Another evaluation of a layer, or a page that is gone: the page alone is made again.
    save_evaluation(settings, 1, cross_entropy=False)
    result, fresh = describe(settings, TOKENS)
    assert fresh
    assert "Without cross-entropy of its own: layer 1." in page_of(settings)
    assert all(each.each_layer_alone is None for each in result.sufficient)
    (folder / "model.html").unlink()
    assert describe(settings, TOKENS)[1]
    assert (folder / "model.html").exists()
    for tokens in (32, 2 * TOKENS):
        with pytest.raises(AssertionError, match="measured again"):
            describe(settings, tokens)
    save_coder(settings, 2, seed=9)
    save_evaluation(settings, 2)
    with pytest.raises(AssertionError, match="measured again"):
        describe(settings, TOKENS)
    monkeypatch.setattr(run, "VERSION", run.VERSION + 1)
    with pytest.raises(AssertionError, match="measured again"):
        describe(settings, TOKENS)


def test_a_file_of_another_version_is_measured_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settings.set_dir() / "model.json"
    monkeypatch.setattr(run, "_measure", fail)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"new": 1}))
    with pytest.raises(AssertionError, match="measured again"):
        describe(settings, TOKENS)
    file.write_text('{"provenance"')
    with pytest.raises(InputError, match=r"model\.json: cannot be read .*remove it to measure again"):
        describe(settings, TOKENS)


def test_an_interruption_leaves_what_was_there(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """And other files of the set stay in any case."""
    folder = settings.set_dir()
    (folder / "graph.png").write_bytes(b"of make circuit")
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("evaluate.metrics.splice.Loss.add", interrupt)
        with pytest.raises(KeyboardInterrupt, match="nothing was written; the same command begins again"):
            describe(settings, 2 * TOKENS)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with monkeypatch.context() as patch:  # while writing: no model.json, so the next call measures
        patch.setattr(run, "write_page", interrupt)
        with pytest.raises(KeyboardInterrupt):
            describe(settings, 2 * TOKENS)
    assert not (folder / "model.json").exists()
    assert describe(settings, 2 * TOKENS)[1]
    assert (folder / "graph.png").exists()
    assert not list(folder.glob("*.tmp"))


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *typed: str) -> tuple[int, str]:
    """Exit code and last line of standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["evaluate.model", *typed])
    with pytest.raises(SystemExit) as stopped:
        run_stage(command.main)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err.strip()


def remove(path: str | Path) -> None:
    shutil.rmtree(path)


def other_prefixes(settings: Settings) -> None:
    save_coder(settings, 2, (4, 9, 12))
    save_evaluation(settings, 2, (4, 9, 12))


def another_model(settings: Settings) -> None:
    """A store of layer 1 from a model of the same name and other weights."""
    folder = Path(settings.paths.activations).parent / "others" / Path(settings.model.name).name
    save_model(folder, "llama", initializer_range=0.5)
    model = settings.model.model_copy(update={"name": str(folder)})
    remove(settings.store_path(1))
    harvest(one(settings, 1).model_copy(update={"model": model}))


REFUSALS: dict[str, tuple[Callable[[Settings], None], tuple[str, ...], str]] = {
    "a layer that is asked for has no run": (
        lambda settings: remove(one(settings, 1).run_dir()),
        ("--layer", "0 1 2"),
        r"layer_1/tiny/transcoder\.safetensors: not found; train this run first \(make train\)",
    ),
    "all layers asked for, and one has no run": (
        lambda settings: remove(one(settings, 1).run_dir()),
        ("--layer", "all"),
        r"tiny-llama: run tiny: expected every layer from 0 to 2, missing 1; train them \(make train LAYER=all RUN",
    ),
    "a layer that the model does not have": (
        lambda settings: None,
        ("--layer", "0-3"),
        r"layer_3/tiny/transcoder\.safetensors: not found; train this run first",
    ),
    "no layer has such a run": (
        lambda settings: None,
        ("--run", "other"),
        r"no layer has a finished run other; train them \(make train LAYER=all RUN=other\)",
    ),
    "another number of prefixes": (
        other_prefixes,
        (),
        r"all layers of a set must be alike; prefixes: layer 0 has 2, layer 2 has 3",
    ),
    "a layer of another model": (
        another_model,
        (),
        r"layer_1\.zarr: is another store than the one asked for \(.*\); harvest that one",
    ),
    "a store that is gone": (
        lambda settings: remove(settings.store_path(2)),
        (),
        r"layer_2\.zarr: .*make harvest",
    ),
    "layers that are not evaluated": (
        lambda settings: [remove(one(settings, layer).run_dir() / "evaluation") for layer in (0, 2)] and None,
        (),
        r"run tiny: layer 0 2 is not evaluated; first: make evaluate LAYER='0 2' RUN=tiny$",
    ),
    "a layer trained again since its evaluation": (
        lambda settings: save_coder(settings, 1, seed=7),
        (),
        r"run tiny: layer 1 was evaluated with other weights; first: make evaluate LAYER=1 RUN=tiny$",
    ),
    "a layer evaluated on other rows": (
        lambda settings: save_evaluation(settings, 1, split="train"),
        (),
        r"run tiny: layer 1 was evaluated on train rows; first: make evaluate",
    ),
    "a layer evaluated on another harvest": (
        lambda settings: save_evaluation(settings, 1, store_fingerprint="0"),
        (),
        r"run tiny: layer 1 was evaluated on another harvest; first: make evaluate",
    ),
    "train rows asked for": (
        lambda settings: None,
        ("--evaluate.split", "train"),
        r'layer 0 1 2 was evaluated on heldout rows; .*RUN=tiny ARGS="--evaluate.split train"$',
    ),
    "a checkpoint": (
        lambda settings: None,
        ("--evaluate.checkpoint", "true"),
        r"evaluate\.checkpoint: a layer set is of finished runs",
    ),
    "fewer tokens than none": (
        lambda settings: None,
        ("--tokens", "-1"),
        r"--tokens: expected a number from 0, found -1",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_is_one_line(
    what: str,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    change, typed, line = REFUSALS[what]
    change(settings)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in settings.set_dir().iterdir()}
    root = tmp_path / "set"
    code, err = said(capsys, monkeypatch, *arguments(root, Path(settings.model.name)), *typed)
    assert code == 2, err
    assert re.search(line, err), err
    assert err.startswith("error: ")
    assert "\n" not in err
    assert {path: path.read_bytes() for path in settings.set_dir().iterdir()} == before


def test_a_store_removed_under_way(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening it and reading its contexts; later nothing more is needed of it."""
    opened = run.open_set

    def removing(settings: Settings, whole: bool) -> Any:
        found = opened(settings, whole)
        remove(settings.store_path(0))
        return found

    monkeypatch.setattr(run, "open_set", removing)
    with pytest.raises(InputError, match=r"layer_0\.zarr/heldout/contexts/.*No such file"):
        describe(settings, 2 * TOKENS)
    assert len(page_of(settings)) > 1000


def test_a_part_of_the_layers_says_so(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without LAYER, every layer that has the run; a directory put aside is none."""
    shutil.copytree(
        one(settings, 1).run_dir(), one(settings, 1).run_dir().parent.with_name("layer_1_old") / RUN
    )
    remove(one(settings, 1).run_dir())
    monkeypatch.setattr(
        sys, "argv", ["x", *arguments(tmp_path / "set", Path(settings.model.name)), "--tokens", "32"]
    )
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        run_stage(command.main)
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "run tiny, layers 0, 2 of 3 layers" in out
    assert "all 2 MLPs replaced at once, 31 tokens" in out
    assert f"page {settings.set_dir() / 'model.html'}" in out
    assert "layers 0, 2 of 3 layers" in page_of(settings)


def test_without_tokens_the_tables_alone(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = describe(settings, 0)
    assert result.replaced.written() == {"skipped": "it was not asked for"}
    assert result.sufficient == []
    assert "not measured, it was not asked for" in page_of(settings)
    assert "Layer by layer" in page_of(settings)


def test_a_layer_alone_counts_with_its_standard_error(original: Path, llama: Path) -> None:
    """An increase of 0.04 with an error of 0.02 is not below 0.05."""
    folder = settings_at(original, llama).set_dir()
    result = ModelMetrics.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    assert isinstance(result.replaced, ReplacedMetrics)

    def alone(error: float | None) -> list[int] | None:
        known = {"increase": 0.04, "increase_error": error}
        layers = [
            layer.model_copy(update={"prefixes": [each.model_copy(update=known) for each in layer.prefixes]})
            for layer in result.layers
        ]
        assert isinstance(result.replaced, ReplacedMetrics)
        return sufficient(result.replaced, layers)[0].each_layer_alone

    assert [alone(0.02), alone(0.009), alone(None)] == [[0, 0, 3], [3, 0, 0], [3, 0, 0]]


def test_a_layers_errors_and_heavy_rows_are_those_of_its_evaluation(settings: Settings) -> None:
    """Of the golden evaluation: zeroing costs 0.34 nats over the layer's clean 3.0; two rows are heavy."""
    evaluation = one(settings, 1).run_dir() / "evaluation"
    values = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    values["prefixes"][1]["cross_entropy"] |= {"increase": increase_of(1, 1), "increase_error": 0.02}
    (evaluation / "metrics.json").write_text(json.dumps(values))
    result, _ = describe(settings, TOKENS)
    layer = result.layers[1]
    assert (layer.heavy_rows, layer.prefixes[1].fvu_typical) == (2, values["errors"]["typical"]["fvu"][1])
    cost = values["cross_entropy"]["zero"] - CLEAN
    assert layer.prefixes[1].recovered_zero_error == pytest.approx(0.02 / cost)
    assert layer.prefixes[0].recovered_zero_error is None
    page = page_of(settings)
    assert f"80.0 ± {100 * 0.02 / cost:.1f}" in page
    assert "+0.300 ± 0.020" in page
    assert '>0.800<span class="mark">†</span>' in page
    assert "† FVU without heavy rows; of all rows, prefix 1: layer 0 0.050 (2 rows" in page
    assert "1,016 tokens" in page


def test_which_prefix_suffices_by_hand(original: Path, llama: Path) -> None:
    folder = settings_at(original, llama).set_dir()
    result = ModelMetrics.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    assert isinstance(result.replaced, ReplacedMetrics)
    values = result.replaced.model_dump()
    for prefix, increase in zip(values["prefixes"], (0.8, 0.2), strict=True):
        prefix["increase"] = increase
    steps = {(0, 0): 0.04, (0, 1): 0.3, (0, 2): 0.02, (1, 0): 0.0, (1, 1): 0.06, (1, 2): 0.2}
    for line in values["first"]["cumulative"]:
        line["increase"] = steps[line["prefix"], line["layer"]]
    found = sufficient(ReplacedMetrics.model_validate(values), result.layers)
    assert tuple(each.limit for each in found) == LIMITS == (0.05, 0.1, 0.25, 0.5, 1.0)
    assert [each.prefix for each in found] == [None, None, 1, 1, 0]
    assert [each.latents for each in found] == [None, None, 27, 27, 12]
    assert [each.layers_from_the_first for each in found] == [[1, 1], [1, 2], [1, 3], [3, 3], [3, 3]]
    # alone: prefix 0 costs 0.3, 0.6, 0.9, prefix 1 half of it
    assert [each.each_layer_alone for each in found] == [
        [0, 0, 3],
        [0, 0, 3],
        [0, 1, 2],
        [1, 2, 0],
        [3, 0, 0],
    ]
    assert CLEAN == 3.0


def test_layers_in_words() -> None:
    assert spans([3]) == "layer 3"
    assert spans([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"


def test_notes_on_layers_that_are_not_alike(original: Path, llama: Path) -> None:
    folder = settings_at(original, llama).set_dir()
    result = ModelMetrics.model_validate_json((folder / "model.json").read_text(encoding="utf-8"))
    assert notes(result) == []
    changed: list[LayerMetrics] = [
        result.layers[0].model_copy(update={"rows": 1000}),
        result.layers[1].model_copy(update={"positions": None}),
        result.layers[2].model_copy(update={"positions": 9}),
    ]
    provenance = result.provenance.model_copy(update={"other_text": [1, 2]})
    assert notes(result.model_copy(update={"layers": changed, "provenance": provenance})) == [
        "The layers were evaluated on different numbers of rows: 1,000 to 4,096.",
        "Without cross-entropy of its own: layer 1.",
        "The cross-entropy with only one MLP replaced was measured on different numbers of tokens.",
        "Harvested from another text, or more of it, than layer 0: layers 1-2.",
    ]


def test_the_runs_weights_are_what_is_compared(settings: Settings) -> None:
    """The digest of a file, not its time: a copy of a run is the same run."""
    for layer in LAYERS:
        (one(settings, layer).run_dir() / FILE_NAME).touch()
    assert describe(settings, TOKENS)[1] is False
    assert settings.run == RUN


def test_the_page_shows_one_prefix_at_a_time_without_a_script(
    browser: Any,  # noqa: F811
    original: Path,
    llama: Path,
) -> None:
    page = Opened(browser, settings_at(original, llama).set_dir() / "model.html", width=360, height=740)
    rows = page.page.locator("tr[data-prefix]")
    assert rows.count() == len(LAYERS) * len(ENDS)
    for g in range(len(ENDS)):
        page.page.click(f"#prefix label:nth-of-type({g + 1})")
        shown = [row.get_attribute("data-prefix") for row in rows.all() if row.is_visible()]
        assert shown == [str(g)] * len(LAYERS)
        assert page.page.locator("ul.verdicts:visible").count() == 1
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.page.evaluate("document.scripts.length") == 0
    page.page.click("tr:visible a")
    assert page.page.url.endswith("/layer_0/tiny/evaluation/report.html")
    page.said.clear()  # that page is a stand-in
    page.close()


def test_two_at_once_are_refused_before_anything_is_measured(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_measure", fail)
    with (
        locked(settings.set_dir() / ".model", None),
        pytest.raises(InputError, match=r"sets/tiny: another make model is at work on it \(process \d+\)"),
    ):
        describe(settings, 2 * TOKENS)
