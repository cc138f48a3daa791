"""Whole runs on a device that is no CPU (tests/pretend.py): the CPU's results, resume, and what a step costs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.settings import Settings
from shards import Batch, Store
from tests.fixtures import make_store
from tests.pretend import DEVICE, pretend_device
from tests.pretend import counted as on_the_fake_device
from tests.train.runs import sparse_rows, tensors
from tests.train.test_runs import assert_same_run, metrics
from train import loop, recipe
from train.loop import Run, train
from train.step.matrix import MatrixStep
from train.step.sparse import SparseStep

Make = Callable[..., Settings]
KERNELS = {"without dead latents": 120, "with dead latents": 160}
SHORT = {"train__rows": 64 * 24, "train__dead_after_rows": 300, "train__heldout_every": 12}
WAITS = 2
"""For the number of candidates, and of dead latents."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The fake device, which is what every setting but "cpu" picks."""
    monkeypatch.setattr(loop, "pick_device", lambda name: torch.device("cpu") if name == "cpu" else DEVICE)
    monkeypatch.setattr(recipe, "has_tf32", lambda device: device.type != "cpu")
    with pretend_device() as counted:
        yield counted


@contextmanager
def running(settings: Settings, store: Store) -> Iterator[tuple[Run, Iterator[Batch]]]:
    """A run on the device, and the batches of an epoch."""
    run = Run(settings, store, DEVICE)
    assert run.log is not None
    loader = store.train.loader(settings.train.batch_size, device=DEVICE, epochs=1)
    with closing(run.log), closing(loader.batches()) as batches:
        yield run, batches


def both(make: Make, **changes: Any) -> tuple[Settings, Settings]:
    """A short run with dead latents, on the CPU and on the device."""
    changes = SHORT | changes
    on_cpu, on_device = (make(run=device, model__device=device, **changes) for device in ("cpu", "cuda"))
    return on_cpu, on_device


@on_the_fake_device
@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (SparseStep, {"train__precision": "float32", "transcoder__skip": True, "train__clip_norm": 0.5}),
        (SparseStep, {"train__precision": "float32", "transcoder__selection": "topk"}),
        (MatrixStep, {"train__precision": "tfloat32", "transcoder__skip": True, "train__clip_norm": 0.5}),
        (MatrixStep, {"transcoder__selection": "topk", "train__density_limit": 0.1}),
        (MatrixStep, {"transcoder__k": 20}),  # on a CPU the dense step
    ],
)
def test_a_run_on_a_device_is_the_cpus(
    step: type, changes: dict[str, Any], make_settings: Make, store: Store, counts: Counter[str]
) -> None:
    """Weights, thresholds, held-out numbers, probes, counters and samples. Other sums round differently, so later steps
    may select other latents near the cut: here they do not.
    """
    precise = {"train__precision": "float32"}
    on_cpu, _ = both(make_settings, **changes | precise)
    _, on_device = both(make_settings, **changes)
    expected, computed = train(on_cpu, store), train(on_device, store)
    assert type(loop.step_for(recipe.Recipe.of(on_device, store, DEVICE).objective, DEVICE)) is step
    assert counts["bytes to device"] > 64 * 24 * (12 + 10)  # the batches among them, a byte a value or more
    for name, tensor in tensors(on_cpu.run_dir()).items():
        torch.testing.assert_close(tensors(on_device.run_dir())[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert computed.metadata["heldout"]["fvu"] == pytest.approx(expected.metadata["heldout"]["fvu"], rel=1e-4)
    lines = metrics(on_cpu.run_dir()), metrics(on_device.run_dir())
    for mine, theirs in zip(*lines, strict=True):
        for name in set(mine) - {"rows_per_second", "data_wait_seconds", "peak_memory_bytes"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-6), (name, mine["step"])
    dead = max(line["dead_features_percentage"] for line in lines[0])
    assert (dead > 0) == ("transcoder__k" not in changes)
    texts = [
        (each.run_dir() / "activation_samples" / "samples.jsonl").read_text() for each in (on_cpu, on_device)
    ]
    assert texts[0].count('"row"') == texts[1].count('"row"') > 100


def test_bfloat16_on_a_device_learns_the_same(
    make_settings: Make, store: Store, counts: Counter[str]
) -> None:
    """Other latents near the cut are selected than in float32; what is learned does not depend on them."""
    on_cpu, _ = both(make_settings)
    _, on_device = both(make_settings, train__precision="bfloat16")
    expected, computed = train(on_cpu, store), train(on_device, store)
    assert computed.metadata["used"]["precision"] == "bfloat16"
    assert computed.metadata["heldout"]["fvu"] == pytest.approx(expected.metadata["heldout"]["fvu"], rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_stopped_run_continues_bit_identically_on_a_device(
    precision: str,
    make_settings: Make,
    store: Store,
    counts: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No operator adds floating-point numbers to one place in an order that a GPU leaves open."""
    changes = SHORT | {"train__precision": precision, "train__checkpoint_every": 10}
    whole, parts = (make_settings(run=run, model__device="cuda", **changes) for run in ("whole", "parts"))
    train(whole, store)
    feed = Run.feed

    def stopping(self: Run, *args: Any) -> None:
        feed(self, *args)
        if self.state.step == 17:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Run, "feed", stopping)
        with pytest.raises(SystemExit):
            train(parts, store)
    train(parts, store)
    assert_same_run(whole.run_dir(), parts.run_dir())
    assert counts["sums in an open order"] == 0


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Rows for 32 batches of 256."""
    path = tmp_path_factory.mktemp("wide") / "tiny" / "layer_0.zarr"
    make_store(path, sparse_rows(8192, 2), sparse_rows(64, 3))
    return Store.open(path)


@on_the_fake_device
@pytest.mark.parametrize("precision", ["float32", "tfloat32", "bfloat16"])
@pytest.mark.parametrize("case", KERNELS)
def test_a_step_of_the_loop_is_few_kernels_and_two_waits(
    precision: str, case: str, make_settings: Make, wide_store: Store, counts: Counter[str]
) -> None:
    """Between logged steps, in four groups like layer 17's recipe, in the run's last tenth, where most is counted.

    256 rows of 1,024 latents take the way of layer 17's 1,024 of 18,432: their cut is guessed from a sample.
    """
    never = {f"train__{what}_every": 1000 for what in ("log", "heldout", "sample", "checkpoint")}
    settings = make_settings(
        transcoder__d_sae=1024, transcoder__group_sizes=(64, 128, 256, 576), transcoder__k=8,
        train__batch_size=256, train__rows=256 * 20, train__precision=precision,
        train__dead_after_rows=1000 if case == "with dead latents" else 10**6, **never,
    )  # fmt: skip
    step: Counter[str] = Counter()
    with running(settings, wide_store) as (run, batches):
        for batch in islice(batches, 19):
            before = Counter(counts)
            run.feed(batch, 32, 0.0)
            step = counts - before
    assert (run.state.n_dead > 0) == (case == "with dead latents")
    assert run.state.kept_rows > 0
    assert 50 < step["kernels"] <= KERNELS[case], step
    assert step["waits"] == WAITS, step
    assert step["bytes to device"] == 0, step
    assert step["bytes to host"] == 0, step


@on_the_fake_device
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "tfloat32"])
def test_the_counts_hold_at_layer_17s_shape(
    precision: str, make_settings: Make, tmp_path: Path, counts: Counter[str]
) -> None:
    """B 1,024, D 2,304, F 18,432, K 96: the fourth step, with dead latents from the second on."""
    groups, rng = (1152, 2304, 4608, 10368), np.random.default_rng(0)
    rows = rng.standard_normal((4096, 2304), dtype=np.float32)
    path = tmp_path / "tiny" / "layer_0.zarr"
    make_store(path, (rows, rows), (rows[:64], rows[:64]), storage="int8")
    never = {f"train__{what}_every": 1000 for what in ("log", "heldout", "sample", "checkpoint")}
    settings = make_settings(
        transcoder__d_sae=sum(groups), transcoder__group_sizes=groups, transcoder__k=96, train__aux_k=512,
        train__batch_size=1024, train__rows=8192, train__precision=precision, train__dead_after_rows=1000, **never,
    )  # fmt: skip
    step: Counter[str] = Counter()
    with running(settings, Store.open(path)) as (run, batches):
        for batch in islice(batches, 4):
            before = Counter(counts)
            run.feed(batch, 4, 0.0)
            step = counts - before
    assert run.state.n_dead > 0
    assert 50 < step["kernels"] <= KERNELS["with dead latents"], step
    assert step["waits"] == WAITS, step


@pytest.mark.parametrize(("broken", "what"), [((7, "outputs"), "prefix 0"), ((12, "inputs"), "prefix 0")])
def test_a_failed_step_is_named_when_the_loop_looks(
    broken: tuple[int, str], what: str, make_settings: Make, store: Store, counts: Counter[str]
) -> None:
    """Logged every ten steps: at the next of these the run stops, with the first failed step and its rows."""
    step, side = broken
    settings, rows = make_settings(model__device="cuda", train__precision="float32"), []

    def feed(run: Run, batches: Iterator[Batch]) -> None:
        for batch in batches:
            rows.append(int(batch.rows[0]))
            if len(rows) == step:
                getattr(batch, side)[3, 1] = torch.inf
            run.feed(batch, 64, 0.0)

    with running(settings, store) as (run, batches), pytest.raises(InputError) as refused:
        feed(run, batches)
    chunk = rows[step - 1] // store.manifest.source.chunk_rows
    assert f"not finite at step {step} ({what}; rows from chunk {chunk} of train on)" in str(refused.value)
    assert len(rows) == -(-step // 10) * 10
    assert all(tensor.isfinite().all() for tensor in run.state.parameters.named().values())
