"""Two nodes of two processes each: two launchers, or four processes in another launcher's environment, on loopback."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from common.nodes import watch
from common.settings import ROOT, Settings
from shards import Store
from tests.train.runs import command, tensors, tiny_settings
from train.loop import train


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listens(head: str) -> bool:
    host, _, port = head.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextmanager
def started(
    commands: list[list[str]], around: Sequence[Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[str]]]:
    """The commands in environments of their own; whatever happens, none is left."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    bare = {key: text for key, text in os.environ.items() if not key.startswith("SLURM_")}
    processes = [
        subprocess.Popen(each, cwd=ROOT, env=bare | {"OMP_NUM_THREADS": "1"} | own, **pipes)  # type: ignore[arg-type]
        for each, own in zip(commands, around, strict=True)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()


def launchers(settings: Settings, *more: str, head: str = "") -> list[list[str]]:
    where = ["--nodes", "2", "--head", head or f"localhost:{free_port()}", *more]
    return 2 * [[sys.executable, "-m", "common.launch", *where, "2", "train", *command(settings)[3:]]]


def ends(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, standard outputs and errors."""
    said = [process.communicate(timeout=200) for process in processes]
    codes = [process.returncode for process in processes]
    return codes, [out for out, _ in said], [error for _, error in said]


def equal(one: Settings, several: Settings) -> bool:
    expected, actual = tensors(one.run_dir()), tensors(several.run_dir())
    return all(float((actual[n] - each).norm() / each.norm()) < 1e-4 for n, each in expected.items())


SLURM = {"SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "localhost,gpu[002-003]", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.timeout(120)
def test_four_tasks_of_srun_equal_one_process(store: Store, store_root: Path, tmp_path: Path) -> None:
    """No option says so; the first task alone prints."""
    one = tiny_settings(store_root, tmp_path, run="one", train__rows=64 * 10)
    four = tiny_settings(store_root, tmp_path, run="four", train__rows=64 * 10)
    train(one, store)
    job = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": str(os.getpid()), "MASTER_PORT": free_port(), **SLURM}
    tasks = [
        job | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % 2), "SLURM_NODEID": str(n // 2)}
        for n in range(4)
    ]
    with started(4 * [command(four)], tasks) as processes:
        codes, printed, errors = ends(processes)
    assert codes == 4 * [0], errors
    assert "held-out rows" in printed[0]
    assert (printed[1:], errors[1:]) == (3 * [""], 3 * [""])
    assert equal(one, four)


def ranks(launcher: int) -> dict[int, int]:
    """Rank -> process, of those that a launcher has started."""
    found = {}
    for each in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        around = Path(f"/proc/{each}/environ").read_text()
        if number := re.search(r"\0RANK=(\d+)\0", around):
            found[int(number[1])] = int(each)
    return found


def until_saved(settings: Settings) -> None:
    until((settings.run_dir() / "state" / "latest").is_file)


def lines(errors: list[str]) -> list[list[str]]:
    """What each said on standard error, without the progress of rank 0."""
    noise = ("rows/s", "warning:", "waiting for ")
    return [[line for line in each.splitlines() if not any(n in line for n in noise)] for each in errors]


def undisturbed(settings: Settings) -> None:
    """Run on two nodes to the end."""
    with started(launchers(settings), 2 * [{}]) as processes:
        codes, _, errors = ends(processes)
    assert codes == [0, 0], errors


@pytest.fixture(scope="module")
def whole(store_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run on two nodes that nothing has happened to."""
    settings = long(store_root, tmp_path_factory.mktemp("whole"))
    undisturbed(settings)
    return tensors(settings.run_dir())


def long(store_root: Path, checkpoints: Path) -> Settings:
    return tiny_settings(store_root, checkpoints, run="a", train__rows=64 * 200)


def assert_as_whole(whole: dict[str, torch.Tensor], settings: Settings) -> None:
    own = tensors(settings.run_dir())
    assert all(torch.equal(own[name], each) for name, each in whole.items())


def assert_goes_on_as_whole(whole: dict[str, torch.Tensor], settings: Settings) -> None:
    undisturbed(settings)
    assert_as_whole(whole, settings)


NAME = socket.gethostname()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_rank_ends_both_nodes(
    whole: dict[str, torch.Tensor], store_root: Path, tmp_path: Path
) -> None:
    """Each node says one line; the same command continues to the weights of an undisturbed run."""
    settings = long(store_root, tmp_path)
    with started(launchers(settings), 2 * [{}]) as processes:
        until_saved(settings)
        rank, process = max(ranks(processes[1].pid).items())
        os.kill(process, signal.SIGKILL)
        begun = time.monotonic()
        codes, _, errors = ends(processes)
        took = time.monotonic() - begun
    assert codes == [2, 137], errors
    (other,), own = lines(errors)
    assert own == [
        f"error: node {rank // 2} ({NAME}), rank {rank} was killed (SIGKILL); the same command continues"
    ]
    assert re.search(
        r"^error: .*(another node|the head \S+|rank \d of 4) has ended or cannot be reached; its output",
        other,
    )
    assert took < 60
    assert_goes_on_as_whole(whole, settings)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_with_restarts(
    whole: dict[str, torch.Tensor], store_root: Path, tmp_path: Path
) -> None:
    """All processes start again, from the last checkpoint."""
    settings = long(store_root, tmp_path)
    with started(launchers(settings, "--max-restarts", "2"), 2 * [{}]) as processes:
        until_saved(settings)
        rank, process = max(ranks(processes[1].pid).items())
        os.kill(process, signal.SIGKILL)
        codes, _, errors = ends(processes)
    assert codes == [0, 0], errors
    killed = (
        f"note: node {rank // 2} ({NAME}), rank {rank} was killed (SIGKILL); all processes are started again"
    )
    assert errors[1].splitlines()[0] == killed
    assert [error.count("note: all processes were restarted after one had ended") for error in errors] in (
        [1, 0],
        [0, 1],
    )
    assert_as_whole(whole, settings)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_on_one_node_stops_both(
    whole: dict[str, torch.Tensor], store_root: Path, tmp_path: Path
) -> None:
    """At a checkpoint; each node says so, the other one by its ranks or by its launcher, whichever ends first."""
    settings = long(store_root, tmp_path)
    with started(launchers(settings), 2 * [{}]) as processes:
        until_saved(settings)
        for process in (*ranks(processes[0].pid).values(), processes[0].pid):  # as a terminal does
            os.kill(process, signal.SIGINT)
        codes, _, errors = ends(processes)
    own, other = ((each.splitlines() or [""])[-1] for each in errors)
    assert (codes[0], own) == (130, "interrupted: the same command continues"), errors
    stopped = rf"interrupted: node \d \({NAME}\) stops with another node; the same command continues"
    ended = r"error: node .* has ended.*"
    assert re.fullmatch({130: stopped, 2: ended}[codes[1]], other), errors
    assert_goes_on_as_whole(whole, settings)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_slow_rank_changes_nothing(
    whole: dict[str, torch.Tensor], store_root: Path, tmp_path: Path
) -> None:
    """Stopped for longer than a machine may be silent, and going on then."""
    settings = long(store_root, tmp_path)
    with started(launchers(settings), 2 * [{}]) as processes:
        until_saved(settings)
        slow = max(ranks(processes[1].pid).values())
        os.kill(slow, signal.SIGSTOP)
        time.sleep(sum(watch.SILENT.values()) + 15)
        assert processes[0].poll() is None
        os.kill(slow, signal.SIGCONT)
        codes, _, errors = ends(processes)
    assert (codes, [line for each in lines(errors) for line in each]) == ([0, 0], [])
    assert_as_whole(whole, settings)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_vanishes(
    lost: int, whole: dict[str, torch.Tensor], store_root: Path, tmp_path: Path
) -> None:
    """All of its processes, the launcher's too, with whom the others have met or not."""
    settings = long(store_root, tmp_path)
    head = f"localhost:{free_port()}"
    with started(launchers(settings, head=head)[:1], [{}]) as first:
        until(lambda: listens(head))
        with started(launchers(settings, head=head)[:1], [{}]) as second:
            until_saved(settings)
            nodes = [*first, *second]
            left, gone = nodes[1 - lost], nodes[lost]
            for process in (gone.pid, *ranks(gone.pid).values()):
                os.kill(process, signal.SIGKILL)
            begun = time.monotonic()
            (code,), _, errors = ends([left])
            took = time.monotonic() - begun
    assert code == 2
    ((line,),) = lines(errors)
    assert re.search(
        r"^error: .*node .*(the head \S+|rank \d of 4) has ended or cannot be reached; its output", line
    )
    assert took < 60
    assert_goes_on_as_whole(whole, settings)


@pytest.fixture
def namespaces() -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """Two networks of this machine, and a cable: what runs a command in each, and its environment there."""
    tag = f"t{os.getpid() % 10**6}"  # names of interfaces have 15 letters at most
    names, ends_ = [f"{tag}-{n}" for n in range(2)], [f"{tag}v{n}" for n in range(2)]
    made = [f"netns add {name}" for name in names]
    made += [f"link add {ends_[0]} netns {names[0]} type veth peer name {ends_[1]} netns {names[1]}"]
    for n, (name, end) in enumerate(zip(names, ends_, strict=True), 1):
        made += [f"-n {name} addr add 10.87.0.{n}/24 dev {end}"]
        made += [f"-n {name} link set {each} up" for each in (end, "lo")]
    ip = shutil.which("ip") or "false"
    try:
        for words in made:
            if subprocess.run([ip, *words.split()], capture_output=True, check=False).returncode:
                pytest.skip(f"ip {words}: not permitted here")
        yield [
            ([ip, "netns", "exec", name], {"GLOO_SOCKET_IFNAME": end, "PET_LOCAL_ADDR": f"10.87.0.{n}"})
            for n, (name, end) in enumerate(zip(names, ends_, strict=True), 1)
        ]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_networks(
    namespaces: list[tuple[list[str], dict[str, str]]], store: Store, store_root: Path, tmp_path: Path
) -> None:
    """Each node with an address of its own, which its host name does not lead to."""
    one = tiny_settings(store_root, tmp_path, run="one", train__rows=64 * 10)
    four = tiny_settings(store_root, tmp_path, run="four", train__rows=64 * 10)
    train(one, store)
    words = launchers(four, head="10.87.0.1:29400")[0]
    with started(
        [[*inside, *words] for inside, _ in namespaces], [own for _, own in namespaces]
    ) as processes:
        codes, _, errors = ends(processes)
    assert codes == [0, 0], errors
    assert equal(one, four)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_network_that_breaks(
    namespaces: list[tuple[list[str], dict[str, str]]], store_root: Path, tmp_path: Path
) -> None:
    """Nothing closes a connection then; both nodes end in a minute, with a line each."""
    settings = long(store_root, tmp_path)
    words = launchers(settings, head="10.87.0.1:29400")[0]
    commands, around = [[*inside, *words] for inside, _ in namespaces], [own for _, own in namespaces]
    with started(commands, around) as processes:
        until_saved(settings)
        (ip, _, _, name), own = namespaces[1]
        subprocess.run([ip, "-n", name, "link", "set", own["GLOO_SOCKET_IFNAME"], "down"], check=True)
        begun = time.monotonic()
        codes, _, errors = ends(processes)
        took = time.monotonic() - begun
    assert codes == [2, 2], errors
    for told in lines(errors):
        (line,) = told
        assert re.search(
            r"^error: .*node .*(the head \S+|rank \d of 4) has ended or cannot be reached; its output", line
        )
    assert took < 60


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("lacking", [0, 1])
def test_a_node_without_the_store(lacking: int, store: Store, store_root: Path, tmp_path: Path) -> None:
    """Its home is another disk. It says so, and the other node ends with it."""
    homes = [tmp_path / "with", tmp_path / "without"]
    for home in homes:
        home.mkdir()
    (homes[0] / "stores").symlink_to(store_root)
    if lacking == 0:
        homes.reverse()
    settings = tiny_settings(Path("stores"), tmp_path / "runs", run="a")
    head = f"localhost:{free_port()}"
    (words, _) = launchers(settings, head=head)
    words[words.index("--paths.activations") + 1] = "~/stores"
    with started([words], [{"HOME": str(homes[0])}]) as first:
        until(lambda: listens(head))
        with started([words], [{"HOME": str(homes[1])}]) as second:
            codes, _, errors = ends([*first, *second])
    assert codes == [2, 2], errors
    told = lines(errors)
    own, (other,) = told[lacking], told[1 - lacking]
    assert own
    for line in own:  # of each rank of the node
        assert re.search(
            rf"^error: node \d \({NAME}\), rank \d: {tmp_path}/without/stores/.*no such store", line
        )
    assert re.search(
        r"^error: .*(another node|the head \S+) has ended or cannot be reached; its output", other
    )
    assert not settings.run_dir().exists()


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_node_that_waits_says_so(store_root: Path, tmp_path: Path) -> None:
    head = f"localhost:{free_port()}"
    with started(launchers(tiny_settings(store_root, tmp_path), head=head)[:1], [{}]) as (node,):
        assert node.stderr is not None
        assert (
            node.stderr.readline()
            == f"waiting for all 2 nodes to join at {head} with this same command, at most 600 s\n"
        )
        node.send_signal(signal.SIGINT)
        codes, _, errors = ends([node])
    assert (codes, errors) == ([130], ["interrupted: the same command continues\n"])


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_head_where_another_program_listens(store_root: Path, tmp_path: Path) -> None:
    """torchrun itself waits there for ever, deaf to SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        head = f"127.0.0.1:{other.getsockname()[1]}"
        words = ["--nodes", "2", "--head", head, "2", *command(tiny_settings(store_root, tmp_path))[2:]]
        with started([[sys.executable, "-m", "common.launch", *words]], [{}]) as processes:
            codes, _, errors = ends(processes)
    assert codes == [2]
    waits, error = errors[0].splitlines()
    assert waits == f"waiting for {head} to answer, at most 40 s"
    assert error.startswith("error: HEAD: node ")
    assert f"the 2 nodes did not meet at {head} (no torchrun answers); start the same command" in error
