"""Harvests into object stores: the same bytes as on a disk, whatever is killed, refused, lost or late."""

import contextlib
import hashlib
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from common.errors import InputError
from common.settings import Settings
from evaluate import stores
from harvest.run import harvest
from shards import Store
from shards.__main__ import _verify
from shards.layout import COMMIT
from shards.objects import owner
from shards.objects.client import Client
from shards.objects.scratch import Scratch
from shards.objects.writer import ObjectWriter
from shards.remote import files_of
from shards.verify import verify
from tests.harvest.test_run import ROOT, Make, command_of
from tests.objects import Bucket, bucket, moto_bucket, now_and_then, quick

FOLDER = "acts/tiny-llama/layer_1.zarr"
ADDRESS = "s3://bucket/acts"


@pytest.fixture
def server() -> Iterator[Bucket]:
    with bucket() as running:
        yield running


@pytest.fixture
def at(settings_for: Make, llama: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(*options: str, address: str = ADDRESS, rows: int = 2000) -> Settings:
        paths = ("--paths.activations", address, "--paths.cache", str(tmp_path / "cache"))
        return settings_for(llama, *paths, *options, rows=rows)

    return make


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def on_disk(path: Path) -> dict[str, str]:
    return digests({str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()})


@pytest.fixture
def whole(settings_for: Make, llama: Path, small_windows: None) -> dict[str, str]:
    """{file: sha256} of the same harvest on a disk, of five windows."""
    (path,) = harvest(settings_for(llama))
    return on_disk(path)


def test_every_byte_is_that_of_a_harvest_on_a_disk(
    whole: dict[str, str], server: Bucket, at: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = at()
    assert harvest(settings) == []
    assert digests(server.below(FOLDER)) == whole
    assert not [path for path in (tmp_path / "cache" / "scratch").rglob("*") if path.is_file()]
    assert len(Store.of(settings).train) == 2000
    assert verify(files_of(settings.store_path(1), tmp_path / "cache", 10**9)) == []


@pytest.mark.parametrize("kind", ["file", "moto"])
def test_other_object_stores(
    kind: str, whole: dict[str, str], at: Callable[..., Settings], tmp_path: Path
) -> None:
    if kind == "file":
        harvest(at(address=f"file://{tmp_path}/there"))
        there = tmp_path / "there/tiny-llama/layer_1.zarr"
        assert on_disk(there) == whole
        assert not (there / ".harvest").exists()
        return
    with moto_bucket() as address:
        settings = at(address=address)
        harvest(settings)
        there = Client(settings.store_path(1))
        assert digests({each.name: there.get(each.name) or b"" for each in there.names()}) == whole


def test_the_table_of_stores_at_an_address(
    at: Callable[..., Settings], small_windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same lines as of the directory that they are in; of an unfinished one too."""
    there = tmp_path / "there"
    address = f"file://{there}"

    def lines() -> list[dict[str, str]]:
        looked = tmp_path / "looked"
        sizes = stores.metadata_of(address, looked)
        found = [stores.line_of(*each, sizes[each[0]]) for each in stores.stores_of(looked)]
        shutil.rmtree(looked)
        assert found == [stores.line_of(*each) for each in stores.stores_of(there)]
        return found

    with stopped_after(monkeypatch, 2), pytest.raises(OSError, match="stopped"):
        harvest(at(address=address))
    assert re.fullmatch(r"unfinished, [1-4] windows of .*", lines()[0]["state"])
    harvest(at(address=address))
    assert [(line["layer"], line["state"]) for line in lines()] == [("1", "complete")]
    with pytest.raises(InputError, match="expected a directory or an address that can be listed"):
        stores.metadata_of("https://host/stores", tmp_path)


KINDS = {
    "throttled": now_and_then(0.3, "429", "503", "500", "408"),
    "reset": now_and_then(0.2, "reset", "cut"),
    "answers are lost": now_and_then(0.2, "lost", seed=1),
    "half arrives": now_and_then(0.1, "half", only="PUT"),
    "old listings": lambda method, _: "old" if method == "LIST" else None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_store_that_fails_now_and_then(
    kind: str,
    whole: dict[str, str],
    server: Bucket,
    at: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the harvest was stopped in the middle: what an old listing does not show is done all the same."""
    quick(monkeypatch)
    server.fault = KINDS[kind]
    with stopped_after(monkeypatch, 2), pytest.raises(OSError, match="stopped"):
        harvest(at())
    done = records(server)
    assert 2 <= len(done) <= 4
    harvest(at())
    assert digests({n: d for n, d in server.below(FOLDER).items() if n[0] != "."}) == whole
    monkeypatch.undo()


@contextlib.contextmanager
def stopped_after(monkeypatch: pytest.MonkeyPatch, windows: int) -> Iterator[None]:
    """The next window cannot be written."""
    write, calls = ObjectWriter.write_window, []

    def stops(self: ObjectWriter, *args: object) -> None:
        calls.append(args)
        if len(calls) > windows:
            raise OSError("stopped")
        write(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ObjectWriter, "write_window", stops)
        yield


def records(server: Bucket) -> dict[str, bytes]:
    return {n: d for n, d in server.below(FOLDER).items() if n.startswith(".harvest/records/")}


def test_continued_on_another_machine(
    whole: dict[str, str],
    server: Bucket,
    at: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is done is asked of the other side: here is nothing, not even the text, and no window is written twice."""
    with stopped_after(monkeypatch, 3), pytest.raises(OSError, match="stopped"):
        harvest(at())
    done = records(server)
    assert len(done) == 3
    assert COMMIT not in server.below(FOLDER)
    with pytest.raises(InputError, match=r"files\.sha256: no complete store there"):
        Store.of(at())
    monkeypatch.setattr("harvest.run._text_pass", lambda *_: None)
    server.asked.clear()
    harvest(at("--paths.cache", str(tmp_path / "another")))
    assert digests(server.below(FOLDER)) == whole
    windows_there = {n for n, size in server.asked.items() if size}
    assert windows_there
    with pytest.raises(InputError, match="holds another harvest"):
        harvest(at("--harvest.seed", "7"))


def test_a_store_that_stays_down_is_one_line(
    server: Bucket, at: Callable[..., Settings], small_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, retries=2)
    put = threading.Event()

    def goes(method: str, name: str) -> str | None:
        if method == "PUT" and "/records/" in name:
            put.set()
        return "503" if put.is_set() else None

    server.fault = goes
    with pytest.raises(InputError, match=rf"{ADDRESS}/tiny-llama/layer_1\.zarr/.*503") as stopped:
        harvest(at())
    assert "\n" not in str(stopped.value)
    assert COMMIT not in server.below(FOLDER)


def test_a_scratch_that_is_full_or_too_small(
    whole: dict[str, str],
    server: Bucket,
    at: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(
        InputError, match=r"paths\.scratch_bytes: 50 kB, but a window of s3://.* takes up to"
    ) as small:
        harvest(at("--paths.scratch_bytes", "50000"))
    assert "give at least" in str(small.value)
    take, most = Scratch.take, []

    def noted(self: Scratch, count: int, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        take(self, count, waiting)
        files = [path for path in self._folder.rglob("c/*") if path.is_file()]
        with contextlib.suppress(FileNotFoundError):
            most.append(sum(path.stat().st_size for path in files) + count)

    monkeypatch.setattr(Scratch, "take", noted)
    monkeypatch.setattr("common.progress.LOG_SECONDS", 0.0)
    server.delay = 0.02
    harvest(at("--paths.scratch_bytes", "200000"))
    assert digests(server.below(FOLDER)) == whole
    assert max(most) < 200_000
    shown = capfd.readouterr()
    assert "waiting for uploads" in shown.err
    assert "uploads " in shown.out


def test_another_harvest_is_at_work(
    whole: dict[str, str], server: Bucket, at: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes on is left alone; one of this machine that is dead, or elsewhere and silent, is followed."""
    monkeypatch.setattr(owner, "BEAT", 0.1)
    monkeypatch.setattr(owner, "PATIENCE", 60.0)
    name = f"{FOLDER}/{owner.NAME}"
    ended = threading.Event()

    def beats() -> None:
        count = 0
        while not ended.wait(0.02):
            count += 1
            there = {"id": "x", "count": count, "machine": "elsewhere", "process": 7}
            server.objects[name] = json.dumps(there).encode()

    other = threading.Thread(target=beats)
    other.start()
    while name not in server.objects:
        time.sleep(0.01)
    try:
        with pytest.raises(
            InputError, match=r"another harvest is writing it \(process 7 of elsewhere\); wait"
        ):
            harvest(at())
    finally:
        ended.set()
        other.join()
    monkeypatch.setattr(owner, "PATIENCE", 0.5)
    server.objects[name] = b"not a name"
    harvest(at())
    assert digests(server.below(FOLDER)) == whole
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    monkeypatch.setattr(owner, "PATIENCE", 1e9)
    there = {"id": "x", "count": 0, "machine": owner.platform.node(), "process": died.pid}
    server.objects[name] = json.dumps(there).encode()
    with owner.Owner(Client(f"{ADDRESS}/tiny-llama/layer_1.zarr")).hold():
        pass
    assert name not in server.objects


def test_a_harvest_that_finished_while_the_lock_was_waited_for(
    whole: dict[str, str],
    server: Bucket,
    at: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Under another name of the same place, whose lock on this machine is another one."""
    lock, settings = ObjectWriter.lock, at(address="s3://bucket/x/../acts")

    def late(self: ObjectWriter, leads: bool = True) -> contextlib.AbstractContextManager[None]:
        monkeypatch.setattr(ObjectWriter, "lock", lock)
        harvest(at("--paths.cache", str(tmp_path / "another")))
        return lock(self, leads)

    monkeypatch.setattr(ObjectWriter, "lock", late)
    with pytest.raises(
        InputError, match="another harvest has finished it meanwhile; give the same command again"
    ):
        harvest(settings)
    assert digests(server.below(FOLDER)) == whole
    assert harvest(settings) == []


def test_damage_is_found_and_repaired_there(
    whole: dict[str, str], server: Bucket, at: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = at()
    harvest(settings)
    where = settings.store_path(1)
    assert _verify(where, settings.paths, repair=False)
    data = bytearray(server.objects[f"{FOLDER}/train/inputs/c/1/0"])
    data[100] ^= 1
    server.objects[f"{FOLDER}/train/inputs/c/1/0"] = bytes(data)
    del server.objects[f"{FOLDER}/train/row_context/c/2"]
    assert not _verify(where, settings.paths, repair=False)
    said = capsys.readouterr().out
    assert "damaged: train/inputs/c/1/0, chunk 0, train/inputs[512:528]: checksum mismatch" in said
    assert "damaged: train/row_context/c/2" in said
    assert _verify(where, settings.paths, repair=True)
    assert "un-committed 2 window(s) (train 1, train 2)" in capsys.readouterr().out
    with pytest.raises(InputError, match="no complete store there"):
        Store.of(settings)
    harvest(settings)
    assert digests(server.below(FOLDER)) == whole
    assert _verify(where, settings.paths, repair=False)
    server.objects[f"{FOLDER}/notes.txt"] = b"mine"
    with pytest.raises(InputError, match=r"notes\.txt: is no file of the store"):
        _verify(where, settings.paths, repair=True)


def test_two_processes_that_share_nothing(
    llama: Path, corpus: Path, settings_for: Make, server: Bucket, at: Callable[..., Settings], tmp_path: Path
) -> None:
    expected = on_disk(harvest(settings_for(llama))[0])
    command = [*command_of(at(), 2), "--paths.cache", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert digests(server.below(FOLDER)) == expected


def kill_and_continue(
    settings: Settings, server: Bucket, expected: dict[str, str], kills: int, tmp_path: Path
) -> None:
    """Kill at a random request, and go on with nothing here, until the store is whole; then from the start."""
    cache = tmp_path / "here"
    command = [
        sys.executable,
        "-m",
        "tests.harvest.shrunk",
        *command_of(settings)[3:],
        "--paths.cache",
        str(cache),
    ]
    rng, killed = random.Random(0), 0
    while True:
        shutil.rmtree(cache, ignore_errors=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        left = itertools.count(rng.randint(1, 250), -1)

        def kills_at_zero(
            *_: str, process: subprocess.Popen[bytes] = process, left: Iterator[int] = left
        ) -> None:
            if next(left) == 0:
                process.send_signal(signal.SIGKILL)

        server.fault = kills_at_zero if killed < kills else lambda *_: None
        _, errors = process.communicate()
        committed = COMMIT in server.below(FOLDER)
        if committed:
            assert digests({n: d for n, d in server.below(FOLDER).items() if n[0] != "."}) == expected
        if process.returncode == -signal.SIGKILL:
            killed += 1
            continue
        assert (process.returncode, committed) == (0, True), errors.decode()
        if killed == kills:
            return
        server.objects.clear()


@pytest.mark.timeout(900)
def test_a_kill_at_a_random_instant(
    whole: dict[str, str], server: Bucket, at: Callable[..., Settings], tmp_path: Path
) -> None:
    kill_and_continue(at(), server, whole, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_20_kills_at_random_instants(
    whole: dict[str, str], server: Bucket, at: Callable[..., Settings], tmp_path: Path
) -> None:
    kill_and_continue(at(), server, whole, 20, tmp_path)
