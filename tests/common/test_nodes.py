"""Which process of which node this is, by the environment of whoever has started it; the examples of docs/nodes.md."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml

from common import cli, device, processes
from common.errors import InputError
from common.nodes import environment
from common.nodes.environment import here, place, rank, recognise_srun, world
from common.processes import Processes
from common.settings import ROOT

TORCHRUN = {"MASTER_ADDR": "gpu-1", "MASTER_PORT": "29500", "RANK": "9", "WORLD_SIZE": "16"}
LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS_PER_NODE": "8",
}
NAME = socket.gethostname()


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of its own, without what started the tests."""
    own = {key: text for key, text in os.environ.items() if key not in {*TORCHRUN, *LOCAL, *SRUN}}
    monkeypatch.setattr(os, "environ", own)
    return own


@pytest.mark.parametrize(
    ("given", "who", "where"),
    [
        ({}, (0, 1, 1), ""),
        (TORCHRUN | LOCAL, (9, 16, 8), f"node 1 ({NAME}), rank 9: "),
        (TORCHRUN | LOCAL | {"LOCAL_WORLD_SIZE": "16"}, (9, 16, 16), "rank 9: "),
        (TORCHRUN, (9, 16, 1), f"node {NAME}, rank 9: "),  # PyTorchJob
        (SRUN, (9, 16, 1), f"node 1 ({NAME}), rank 9: "),
        (
            SRUN | TORCHRUN | LOCAL | {"RANK": "3"},
            (3, 16, 8),
            f"node 1 ({NAME}), rank 3: ",
        ),  # torchrun in a task
        (SRUN | {"SLURM_NTASKS": "1"}, (0, 1, 1), ""),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 1), ""),  # a shell of salloc
        (
            {key: SRUN[key] for key in SRUN if key != "SLURM_STEP_ID"},
            (0, 1, 1),
            "",
        ),  # the batch script itself
    ],
)
def test_who_and_where(
    given: dict[str, str], who: tuple[int, int, int], where: str, around: dict[str, str]
) -> None:
    around.update(given)
    recognise_srun()
    assert (rank(), world(), here(), place()) == (*who, where)


def test_srun_becomes_what_torchrun_sets(around: dict[str, str]) -> None:
    around.update(SRUN)
    recognise_srun()
    assert {key: around[key] for key in (*TORCHRUN, "LOCAL_RANK")} == TORCHRUN | {
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "16711",
    }
    around.clear()
    around.update(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    recognise_srun()
    assert (around["MASTER_ADDR"], around["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize("lacking", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"])
def test_srun_without_a_variable(lacking: str, around: dict[str, str]) -> None:
    around.update({key: SRUN[key] for key in SRUN if key != lacking})
    with pytest.raises(InputError, match=f"SLURM_STEP_ID=0, but no {lacking}: srun, which sets all of them"):
        recognise_srun()


def test_first_hosts() -> None:
    named = {"gpu[003-005,7]": "gpu003", "a1,b[2-4]": "a1", "r[1,3]n[07-09]-ib,x": "r1n07-ib", "n": "n"}
    assert {nodes: environment.first_host(nodes) for nodes in named} == named


def test_a_place_that_cannot_be_told_hides_no_error(around: dict[str, str]) -> None:
    around.update(TORCHRUN | {"RANK": "x"})
    assert place() == ""


def test_a_gpu_of_each_process(around: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number on the node, not in the run; srun may show a task no other than its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    around.update(TORCHRUN | LOCAL)
    for there, expected in ((8, "cuda:1"), (1, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        if there == 1:
            with pytest.raises(InputError, match="cuda:1 requested, but PyTorch finds 1 GPU"):
                device.pick_device("auto")
            around.update(SRUN)
        assert str(device.pick_device("auto")) == expected


def test_cores_are_shared_by_the_processes_of_a_node(
    around: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setattr(device.container, "cores_allowed", lambda: None)
    assert device.cores() == 32
    around.update(TORCHRUN | LOCAL)
    assert device.cores() == 4
    around.pop("OMP_NUM_THREADS", None)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    device.share_cores()
    assert chosen == [4]


def test_an_error_begins_with_node_and_rank(around: dict[str, str]) -> None:
    """And what is printed comes from the first process alone."""
    code = (
        "from common import cli\nfrom common.errors import InputError\n"
        "def stage():\n    print('a table')\n    raise InputError('layer: none given')\ncli.run_stage(stage)"
    )
    for number, printed in (("0", "a table\n"), ("9", "")):
        around.update(TORCHRUN | LOCAL | {"RANK": number})
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=around, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, printed)
        assert done.stderr == f"error: node 1 ({NAME}), rank {number}: layer: none given\n"


def test_who_did_not_come_is_named(around: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    store.set("here/2", "")
    monkeypatch.setattr(processes.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 4)]))
    monkeypatch.setattr(processes, "COME", 1)
    around.update(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "4"})
    with pytest.raises(InputError, match=r"^of 4 ranks these did not arrive within 1 s: 1 3; their output"):
        processes.meet(torch.device("cpu"))
    for late in "13":
        store.set(f"here/{late}", "")
    assert processes._all_here() is store


def test_what_a_lost_connection_becomes(
    around: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of the node's first process; torchrun is left it, once for the node."""
    monkeypatch.setattr(processes, "GRACE", 0)
    around.pop("TORCHELASTIC_ERROR_FILE", None)
    around.update(TORCHRUN)
    lost = "[/a/b/gloo/pair.cc:5] Connection closed by peer [::1]:5. This is typically a crash."
    line = r"another of the 16 processes has ended.*\(Connection closed by peer \[::1\]:5\); its output"
    for error in (RuntimeError(lost), dist.DistBackendError(lost)):
        with pytest.raises(InputError, match=line), processes.ended_together():
            raise error
    with pytest.raises(RuntimeError, match="shapes"), processes.ended_together():
        raise RuntimeError("shapes do not fit")
    around["LOCAL_RANK"] = "1"
    with pytest.raises(SystemExit, match="2"), processes.ended_together():
        raise RuntimeError(lost)
    around.update(LOCAL | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "note"), "LOCAL_RANK": "0"})
    with pytest.raises(SystemExit, match="2"), processes.ended_together():
        raise RuntimeError(lost)
    left = json.loads((tmp_path / "note").read_text())["message"]
    assert re.match(rf"node 1 \({NAME}\), rank 9: {line}", left)


WATCHING = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from common.nodes import watch

watch.GRACE = float(sys.argv[2])
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 3, os.environ["RANK"] == "0", timedelta(seconds=100))
with watch.watched(store):
    print("there", flush=True)
    if sys.stdin.readline() == "fails\\n":
        raise SystemExit(7)
"""


@contextmanager
def three_pods(around: dict[str, str], grace: float = 0.2) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that watch each other, each on a node of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    around.update({"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ExitStack() as stack:
        pods = []
        for number in range(3):
            own = around | {"RANK": str(number)}
            words = [sys.executable, "-c", WATCHING, port, str(grace)]
            pods.append(subprocess.Popen(words, cwd=ROOT, env=own, text=True, **pipes))  # type: ignore[arg-type]
            stack.enter_context(pods[-1])
            stack.callback(pods[-1].kill)
        for pod in pods:
            assert pod.stdout is not None
            assert pod.stdout.readline() == "there\n"
        yield pods


def said(pod: subprocess.Popen[str]) -> tuple[int, str]:
    code = pod.wait(timeout=100)
    assert pod.stderr is not None
    return code, pod.stderr.read()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_loss_of_a_process_ends_the_others(lost: int, around: dict[str, str]) -> None:
    """Though nothing is exchanged, and whatever they do: here they wait for a line."""
    with three_pods(around) as pods:
        pods[lost].kill()
        for number, pod in enumerate(pods):
            if number != lost:
                why = "its output or its node's tells why, and the same command continues"
                line = f"rank {lost} of 3 has ended or cannot be reached; {why}"
                assert said(pod) == (2, f"error: node {NAME}, rank {number}: {line}\n")


def test_who_is_done_says_goodbye(around: dict[str, str]) -> None:
    """One after another: those that are left stay."""
    with three_pods(around) as pods:
        for pod in pods:
            assert pod.stdin is not None
            pod.stdin.close()
            assert said(pod) == (0, "")


def test_a_reason_of_its_own_is_kept(around: dict[str, str]) -> None:
    """The first process fails; the others, which are failing too, are not ended for that."""
    with three_pods(around, grace=60) as pods:
        for pod in pods:
            assert pod.stdin is not None
            pod.stdin.write("fails\n")
            pod.stdin.flush()
            assert said(pod) == (7, "")


def test_a_node_with_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SEEN", 0.1)
    there = Processes(1, 2)
    with pytest.raises(
        InputError,
        match=f"^{tmp_path}/run.json: rank 0 has written it, but it did not appear here within 0.1 s",
    ):
        there.see(tmp_path / "run.json")
    Processes(0, 2).see(tmp_path / "run.json")
    (tmp_path / "run.json").touch()
    there.see(tmp_path / "run.json")


def block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", (ROOT / "docs/nodes.md").read_text(encoding="utf-8"), re.S)
    assert match is not None
    return match[1]


def train_options(words: list[str]) -> SimpleNamespace:
    """A documented command's options, as the stage reads them."""
    assert words[:3] == [".venv/bin/python", "-m", "train"]
    options = cli.parser("train", "")
    settings, _ = cli.load(options, words[3:])
    return SimpleNamespace(layers=settings.layers, run=settings.run)


def test_the_slurm_script() -> None:
    script = block("bash")
    subprocess.run(["bash", "-n", "-c", script], check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    *_, last = script.strip().splitlines()
    srun, _, words = last.partition(" .venv")
    assert srun.split() == ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={asked['cpus-per-task']}"]
    assert vars(train_options(f".venv{words}".split())) == {"layers": (17,), "run": "name"}


def test_the_kubernetes_job() -> None:
    job = yaml.safe_load(block("yaml"))
    assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: each["replicas"] for name, each in replicas.items()} == {"Master": 1, "Worker": 3}
    for each in replicas.values():
        spec = each["template"]["spec"]
        (container,) = spec["containers"]
        assert container["name"] == "pytorch"  # the operator's environment goes to this one
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in spec["volumes"]
        }
        assert vars(train_options(container["command"])) == {"layers": (17,), "run": "name"}
