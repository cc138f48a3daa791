"""The language model's own losses: measured once for a store, read by every other evaluation of it alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.settings import Settings
from evaluate.kept.losses import OwnLosses
from evaluate.metrics import language, splice
from evaluate.metrics.language import measure_language
from evaluate.metrics.splice import Loss
from harvest.run import harvest
from shards import Store
from shards.remote import LocalFiles
from tests.disk import small_disk
from tests.evaluate.fakes import random_coder

TOKENS = 128


@pytest.fixture(scope="module")
def harvested(llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    from common.cli import load, parser

    root = tmp_path_factory.mktemp("losses")
    options = {
        "--layer": "1",
        "--model.name": str(llama),
        "--model.device": "cpu",
        "--data.files": str(corpus),
        "--data.pack": "concat",
        "--harvest.rows": "600",
        "--harvest.context_length": "32",
        "--harvest.heldout_fraction": "0.3",
        "--paths.activations": str(root / "activations"),
        "--paths.cache": str(root / "cache"),
    }
    settings = load(parser("harvest", ""), [word for pair in options.items() for word in pair])[0]
    harvest(settings)
    return settings


@pytest.fixture
def spliced(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was put in the MLP's place, at each call."""
    names: list[list[str]] = []
    own = splice.splice

    def counted(*arguments: object) -> dict[str, Loss]:
        names.append([*arguments[3]])  # type: ignore[misc]
        return own(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(splice, "splice", counted)
    return names


@pytest.fixture
def fresh(harvested: Settings, tmp_path: Path) -> Settings:
    """The store below a directory of its own, without losses."""
    store = Path(harvested.store_path(1))
    place = tmp_path / "activations" / harvested.model_slug
    place.mkdir(parents=True)
    (place / store.name).symlink_to(store)
    paths = {"activations": str(tmp_path / "activations"), "cache": tmp_path / "cache"}
    return harvested.model_copy(update={"paths": harvested.paths.model_copy(update=paths)})


def measured(settings: Settings, seed: int = 0, tokens: int = TOKENS) -> language.Language:
    store = Store.of(settings)
    split = getattr(store, settings.evaluate.split)
    return measure_language(settings, store, split, random_coder(32, 32, (4, 9), seed=seed), tokens)


def files(settings: Settings) -> list[Path]:
    return sorted(Path(settings.store_path(1)).with_suffix(".losses").glob("*.safetensors"))


def test_the_second_evaluation_ablates_nothing(fresh: Settings, spliced: list[list[str]]) -> None:
    """Of another run: the model runs for its own prefixes alone, and every number is the same to the last bit."""
    first = measured(fresh)
    assert spliced == [["zero", "mean", "0", "1"]]
    (file,) = files(fresh)
    second = measured(fresh)
    assert spliced[1:] == [["0", "1"]]
    assert (second.cross_entropy, second.prefixes) == (first.cross_entropy, first.prefixes)
    assert {name: values.tolist() for name, values in second.by_context.items()} == {
        name: values.tolist() for name, values in first.by_context.items()
    }
    other = measured(fresh, seed=3)
    assert spliced[2:] == [["0", "1"]]
    assert other.cross_entropy == first.cross_entropy
    assert other.prefixes != first.prefixes
    assert files(fresh) == [file]


def test_other_tokens_or_rows_have_their_own(fresh: Settings, spliced: list[list[str]]) -> None:
    measured(fresh)
    measured(fresh, tokens=64)
    train = fresh.model_copy(update={"evaluate": fresh.evaluate.model_copy(update={"split": "train"})})
    measured(train)
    assert [each[0] for each in spliced] == ["zero"] * 3
    assert len(files(fresh)) == 3


def test_what_decides_the_losses_is_in_their_name(fresh: Settings) -> None:
    store = Store.of(fresh)
    source = store.manifest.source
    contexts, mean = store.heldout.contexts[np.arange(2)], torch.ones(32)

    def key(
        settings: Settings = fresh,
        contexts: np.ndarray = contexts,
        mean: torch.Tensor = mean,
        device: str = "cpu",
        **of: object,
    ) -> str:
        other = Store(
            LocalFiles(store.path),
            store.manifest.model_copy(update={"source": source.model_copy(update=of)}),
            {"train": store.train, "heldout": store.heldout},
        )
        return OwnLosses.of(settings, [other], contexts, [mean], torch.device(device)).key

    changed = contexts.copy()
    changed[1, 3] += 1
    keys = [
        key(),
        key(contexts=contexts[:1]),
        key(contexts=changed),
        key(mean=mean * 2),
        key(device="meta"),
        key(weights_sha256="0" * 64),
        key(dtype="float16"),
        key(layer=2),
        key(output_hook="blocks.1.hook_mlp_out2"),
        key(dropped_token_ids=[7]),
    ]
    assert len({*keys}) == len(keys)
    assert key() == keys[0]


def test_losses_that_are_damaged_or_of_another_model_are_measured_again(
    fresh: Settings, spliced: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = measured(fresh)
    (file,) = files(fresh)
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:100], b""):
        file.write_bytes(damaged)
        capsys.readouterr()
        assert measured(fresh).cross_entropy == first.cross_entropy
        assert f"{file}: damaged (" in capsys.readouterr().err
        assert file.read_bytes() == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            OwnLosses, "read", lambda self: {name: Loss(3, 30.0) for name in ("clean", "zero", "mean")}
        )
        assert measured(fresh).cross_entropy == first.cross_entropy
    assert spliced[-1] == ["zero", "mean"]


@pytest.mark.parametrize("cached", [True, False])
def test_beside_a_store_that_is_read_only(
    cached: bool,
    fresh: Settings,
    spliced: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are in the cache; where that cannot be written either, a line says so and the numbers are there."""
    store = Path(fresh.store_path(1))
    with small_disk(tmp_path / "disk", "1m") as (disk, remount):
        place = disk / "activations" / fresh.model_slug
        place.mkdir(parents=True)
        (place / store.name).symlink_to(store.readlink())
        remount("ro")
        paths = {"activations": str(disk / "activations")} | ({} if cached else {"cache": disk / "cache"})
        settings = fresh.model_copy(update={"paths": fresh.paths.model_copy(update=paths)})
        first = measured(settings)
        assert measured(settings).cross_entropy == first.cross_entropy
        assert spliced[1] == (["0", "1"] if cached else ["zero", "mean", "0", "1"])
        line = "the language model's own losses were not kept"
        assert (line in capsys.readouterr().err) is not cached


def test_kept_for_a_store_at_an_address(fresh: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache alone: nothing is written beside files that are somebody else's."""
    own, store = [], Store.of(fresh)
    monkeypatch.setattr(Settings, "store_path", lambda self, layer: f"s3://bucket/layer_{layer}.zarr")
    own = OwnLosses.of(
        fresh, [store], store.heldout.contexts[np.arange(1)], [torch.ones(32)], torch.device("cpu")
    )
    assert [*own.folders] == [fresh.paths.cache / "losses"]


def test_losses_of_two_layers_ablated_together(
    fresh: Settings, settings_for: Callable[..., Settings]
) -> None:
    store = Store.of(fresh)
    contexts, mean = store.heldout.contexts[np.arange(2)], torch.ones(32)
    one, both = (
        OwnLosses.of(fresh, stores, contexts, [mean] * len(stores), torch.device("cpu"))
        for stores in ([store], [store] * 2)
    )
    assert one.key != both.key
    loss = Loss(divergence=0.1 + 0.2, agreed=7)
    for nats in np.random.default_rng(0).random((2, 31), np.float32):
        loss.add_context(nats)
    both.keep({"clean": loss})
    assert one.read() is None
    kept = both.read()
    assert kept is not None
    assert (kept["clean"].cross_entropy, kept["clean"].divergence, kept["clean"].agreed) == (
        loss.cross_entropy,
        0.1 + 0.2,
        7,
    )
    assert kept["clean"].positions == 62
