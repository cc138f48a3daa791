"""harvest.keep layer: groups of layers to their ends, from wherever a kill has left them."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from common.cli import parser, read
from common.errors import InputError
from common.settings import ROOT
from harvest import by_layer
from harvest.run import harvest
from shards import Store
from shards.commit import read_commit
from shards.layout import COMMIT, WORK
from shards.remote import LocalFiles
from shards.verify import verify
from shards.writer import StoreWriter
from transcoder import weights

LAYERS = 3


class Killed(BaseException):
    """kill -9."""


class Stages:
    """In place of the processes of the stages: what each would leave, by copying and touching."""

    def __init__(self, stores: Path, runs: Path, act: Path) -> None:
        self.stores, self.runs, self.act = stores, runs, act
        self.done: list[tuple[str, tuple[int, ...]]] = []
        self.fails: set[tuple[str, int]] = set()
        self.until: int | None = None
        """Stages after which the driver is killed, counted from one."""

    def ended(self, command: Sequence[str]) -> int:
        stage, *arguments = command
        words = (
            [word for word in arguments if word.startswith("--layer=")][-1].removeprefix("--layer=").split()
        )
        return self.run(stage, [int(word) for word in words], arguments)

    def each(self, commands: Mapping[int, Sequence[str]], places: int) -> list[int]:
        assert places == 1
        return [layer for layer, (stage, *rest) in commands.items() if self.run(stage, [layer], rest)]

    def run(self, stage: str, layers: Sequence[int], arguments: Sequence[str]) -> int:
        assert (
            arguments[-1 if stage != "harvest" else arguments.index("--harvest.keep=all")]
            == "--harvest.keep=all"
        )
        assert stage == "harvest" or "--force" not in arguments
        if self.until is not None and len(self.done) == self.until:
            raise Killed
        code = 0
        for layer in layers:
            store, marker = self.act / f"layer_{layer}.zarr", self.runs / f"{stage}-{layer}"
            if (stage, layer) in self.fails:
                code = 2
            elif stage == "harvest":
                shutil.copytree(self.stores / store.name, store, dirs_exist_ok=True)
            elif not marker.exists():
                if Store.open(store).train.removed:
                    code = 2
                else:
                    marker.touch()
        self.done.append((stage, tuple(layers)))
        return code


@pytest.fixture(scope="module")
def stores(llama: Path, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Of all layers, as a harvest leaves them."""
    root = tmp_path_factory.mktemp("stores")
    settings = read(parser("harvest", ""), argv(llama, corpus, root)).settings(tuple(range(LAYERS)))
    return harvest(settings)[0].parent


def argv(llama: Path, corpus: Path, act: Path, *more: str) -> list[str]:
    return [
        *(
            "--layer",
            " ".join(map(str, range(LAYERS))),
            "--model.name",
            str(llama),
            "--data.files",
            str(corpus),
        ),
        *("--data.pack", "concat", "--harvest.rows", "2000", "--harvest.context_length", "32"),
        *("--harvest.heldout_fraction", "0.1", "--paths.activations", str(act), "--model.device", "cpu"),
        *("--paths.checkpoints", str(act / "checkpoints"), *more),
    ]


Drive = Callable[..., None]


@pytest.fixture
def stages(stores: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    made = Stages(stores, tmp_path, tmp_path / stores.name)
    monkeypatch.setattr(by_layer, "_ended", made.ended)
    monkeypatch.setattr(by_layer.spread, "each", made.each)
    return made


@pytest.fixture
def drive(
    stages: Stages, llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Drive:
    """The driver with further options."""

    def call(*more: str) -> None:
        words = argv(llama, corpus, tmp_path, "--harvest.keep", "layer", *more)
        monkeypatch.setattr(sys, "argv", ["harvest", *words])
        options = parser("harvest", "")
        for name in by_layer.OWN:
            options.add_argument(name, action="store_true")
        asked = read(options, words)
        by_layer.by_layer(asked, asked.settings(tuple(range(LAYERS))))

    return call


def ends(act: Path) -> list[bool]:
    """Of each layer, whether its train rows were removed, and what is left is whole."""
    paths = [act / f"layer_{layer}.zarr" for layer in range(LAYERS)]
    assert all(verify(LocalFiles(path)) == [] for path in paths)
    return [Store.open(path).train.removed for path in paths]


TWO = ("--harvest.disk_bytes", "400000")
"""Room for two layers of 161 kB, or for one and the 132 kB that are kept of two."""


def test_groups_that_fit_and_nothing_is_done_twice(stages: Stages, drive: Drive) -> None:
    drive(*TWO)
    assert stages.done == [
        ("harvest", (0, 1)),
        *((stage, (layer,)) for stage in ("train", "evaluate") for layer in (0, 1)),
        *((stage, (2,)) for stage in ("harvest", "train", "evaluate")),
    ]
    assert ends(stages.act) == [True] * LAYERS
    stages.done.clear()
    drive(*TWO)
    assert stages.done == [("train", (0, 1, 2))]  # asked whether they are trained as asked for


def test_killed_between_any_two_stages(stages: Stages, drive: Drive, stores: Path) -> None:
    for until in range(9):
        for path in (*stages.act.glob("*.zarr"), *stages.runs.glob("*-?")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        stages.until, stages.done = until, []
        if until < 8:
            with pytest.raises(Killed):
                drive(*TWO)
        stages.until, before, stages.done = None, stages.done, []
        drive(*TWO)
        assert ends(stages.act) == [True] * LAYERS, until
        harvests = [layer for stage, layers in before + stages.done if stage == "harvest" for layer in layers]
        assert sorted(harvests) == [0, 1, 2], until


@pytest.mark.parametrize("stage", ["harvest", "train", "evaluate"])
def test_a_layer_that_fails_keeps_its_rows_and_does_not_stop_the_others(
    stages: Stages, drive: Drive, stage: str
) -> None:
    stages.fails = {(stage, 1)}
    with pytest.raises(InputError, match=rf"^1 of 3 layers failed \(1: {stage}\), as said above; "):
        drive()
    paths = [stages.act / f"layer_{layer}.zarr" for layer in (0, 2)]
    assert [Store.open(path).train.removed for path in paths] == [True, True]
    if stage != "harvest":
        assert not Store.open(stages.act / "layer_1.zarr").train.removed
    stages.fails.clear()
    drive()
    assert ends(stages.act) == [True] * LAYERS


def test_rows_that_another_begun_run_needs_stay(
    stages: Stages,
    drive: Drive,
    capsys: pytest.CaptureFixture[str],
    llama: Path,
    corpus: Path,
    tmp_path: Path,
) -> None:
    assert (by_layer.BEGUN, by_layer.FINISHED) == (weights.BEGUN, weights.FILE_NAME)
    runs = read(parser("harvest", ""), argv(llama, corpus, tmp_path)).alone(1, "x").run_dir().parent
    fingerprint = Store.open(stages.stores / "layer_1.zarr").manifest.fingerprint
    for name, of in (("begun", fingerprint), ("of-another-harvest", "f" * 64)):
        (runs / name).mkdir(parents=True)
        (runs / name / weights.BEGUN).write_text(json.dumps({"harvest_fingerprint": of}))
    with pytest.raises(InputError, match=r"^1 of 3 layers failed \(1: rows kept\)"):
        drive()
    assert f"error: layer 1: {runs / 'begun'}: begun on these train rows" in capsys.readouterr().err
    assert [Store.open(stages.act / f"layer_{n}.zarr").train.removed for n in range(LAYERS)] == [
        True,
        False,
        True,
    ]
    (runs / "begun" / weights.FILE_NAME).touch()
    drive()
    assert ends(stages.act) == [True] * LAYERS


def test_a_run_that_trains_on_the_rows_is_waited_for(
    stages: Stages, drive: Drive, llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = read(parser("harvest", ""), argv(llama, corpus, tmp_path)).alone(1, "x").run_dir().parent
    fingerprint = Store.open(stages.stores / "layer_1.zarr").manifest.fingerprint
    (runs / "other").mkdir(parents=True)
    (runs / "other" / weights.BEGUN).write_text(json.dumps({"harvest_fingerprint": fingerprint}))
    (runs / "other" / ".lock").touch()

    def ends_meanwhile(*locks: Path) -> None:
        if runs / "other" / ".lock" in locks:
            (runs / "other" / weights.FILE_NAME).touch()

    monkeypatch.setattr(by_layer, "_wait_for", ends_meanwhile)
    drive()
    assert ends(stages.act) == [True] * LAYERS


def test_rows_that_were_removed_are_not_harvested_again_by_mistake(
    stages: Stages, drive: Drive, capsys: pytest.CaptureFixture[str]
) -> None:
    drive()
    (stages.runs / "train-1").unlink()  # another run is asked for
    stages.done.clear()
    with pytest.raises(InputError, match=r"1 of 3 layers failed \(1: train\)"):
        drive()
    assert "harvest" not in {stage for stage, _ in stages.done}
    stages.done.clear()
    drive("--refill")
    assert ("harvest", (1,)) in stages.done
    assert ends(stages.act) == [True] * LAYERS


def test_what_does_not_fit_is_said_before_anything_is_begun(stages: Stages, drive: Drive) -> None:
    with pytest.raises(
        InputError, match=r"layer 0 takes .* kB, and harvest.disk_bytes leaves 100 kB for it; lower"
    ):
        drive("--harvest.disk_bytes", "100000")
    assert stages.done == []
    drive("--harvest.disk_bytes", "100000", "--force")
    assert ends(stages.act) == [True] * LAYERS


def test_rows_of_another_harvest_are_neither_trained_on_nor_removed(stages: Stages, drive: Drive) -> None:
    shutil.copytree(stages.stores / "layer_1.zarr", stages.act / "layer_1.zarr")
    digests = read_commit(stages.act / "layer_1.zarr")
    with pytest.raises(InputError, match=r"1 of 3 layers failed \(1: harvest\)"):
        drive("--harvest.seed", "1")
    assert read_commit(stages.act / "layer_1.zarr") == digests
    assert ("train", (1,)) not in stages.done


def test_a_repaired_window_of_a_store_without_train_rows(
    stages: Stages, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer was said to have failed, with nothing that told why."""
    drive()
    store = stages.act / "layer_1.zarr"
    commit = (store / COMMIT).read_bytes()
    StoreWriter(store).uncommit([("heldout", 0)])

    def ended(command: Sequence[str]) -> int:
        if command[0] != "harvest":
            return stages.ended(command)
        assert "--layer=1" in command
        shutil.rmtree(store / WORK)
        (store / COMMIT).write_bytes(commit)
        return 0

    monkeypatch.setattr(by_layer, "_ended", ended)
    drive()
    assert ends(stages.act) == [True] * LAYERS


def test_an_address_is_refused_before_a_folder_of_its_name_is_made(
    drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"harvest\.keep layer works in a directory"):
        drive("--paths.activations", "s3://bucket/activations")
    assert not (tmp_path / "s3:").exists()


def test_several_processes_are_refused(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_layer, "world", lambda: 2)
    with pytest.raises(InputError, match="leave NPROC out"):
        drive()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_of_the_real_thing(llama: Path, corpus: Path, stores: Path, tmp_path: Path) -> None:
    """Three kill -9 at random instants: the stages end with the driver, and the same command goes on."""
    training = (
        *("--transcoder.d_sae", "64", "--transcoder.group_sizes", "16,48", "--transcoder.k", "4"),
        *(
            "--train.rows",
            "6400",
            "--train.batch_size",
            "64",
            "--train.warmup_steps",
            "5",
            "--wandb.mode",
            "disabled",
        ),
    )
    command = [sys.executable, "-m", "harvest", "--run", "r", "--harvest.keep", "layer", *TWO, *training]
    command += argv(llama, corpus, tmp_path)
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(5, 40))
        process.kill()
        process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    act = tmp_path / stores.name
    assert ends(act) == [True] * LAYERS
    for layer in range(LAYERS):
        run = tmp_path / "checkpoints/transcoder" / stores.name / f"layer_{layer}/r"
        assert (run / "transcoder.safetensors").exists()
        assert json.loads((run / "evaluation/metrics.json").read_text())["baselines"]["linear"]["fvu"] < 1
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.count("train rows removed: nothing to do") == LAYERS
    assert not list(tmp_path.rglob("*.tmp"))
