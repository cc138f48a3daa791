"""The parts of `make gpu`. Each gives its figures beside its floor on the same device; medians, in turns.

Floor of a step: the encoder's product in the step's precision, and torch.optim.Adam(fused) over parameters of the same
sizes. Of a loop: the bare step. Of the loader: the copy of the stored bytes. Of a harvest: the bare forward pass. Of an
evaluation: encoding and decoding rows that are on the device. `Sizes` are the only difference between a GPU and a test.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import harvest as bench_harvest
from bench.train_loop import TURNS, alternate, wait
from bench.train_step import floor, rows
from common.cli import load, parser
from common.errors import InputError
from common.settings import ROOT, Settings
from common.tokens import TokenText
from evaluate.labels.choose import choose
from evaluate.labels.measured import Measured
from evaluate.labels.words import Words
from evaluate.metrics.baselines import Baselines, fit_ridge
from evaluate.metrics.measure import training_selection
from evaluate.metrics.passes import first_pass, second_pass
from evaluate.metrics.redundancy import decoder_similarity
from shards import Store
from shards.store import read_tokenizer
from tests.fixtures import make_store
from tests.models import save_model, sentences, write_jsonl
from train.loop import Run, step_for
from train.recipe import initialise
from train.step.losses import Objective, prefix_weights
from train.step.matrix import tensor_cores
from train.step.optimizer import Adam, apply
from transcoder import Transcoder
from transcoder.selection import kth_largest

RESULTS = ROOT / "bench" / "results" / "gpu.json"
PEER = Path(__file__).with_name("peer.py")
GROUPS = (1, 2, 4, 9)
"""In proportion: Gemma-2-2B's layer 17 of docs/training.md has 1152, 2304, 4608 and 10368 latents."""
PRECISIONS = ("float32", "tfloat32", "bfloat16")
REPEATS = 10
TESTS = (
    "tests/evaluate/test_device.py",
    "tests/train/step/test_device.py",
    "tests/train/step/test_mesh.py",
    "tests/train/test_on_device.py",
)


@dataclass(frozen=True)
class Sizes:
    """How much is done. `d`: width of inputs and outputs, `k`: active latents a row."""

    d: int
    k: int
    square: int
    """Rows and columns of the ceilings' products."""
    steps: tuple[tuple[int, int], ...]
    """(rows a batch, latents)"""
    latents: int
    """Of the loop, the resume check, the evaluation and the peers."""
    rows: int
    """Train rows of the store; a quarter as many are held out."""
    batches: tuple[int, ...]
    turn: int
    """Steps of a turn of the loop."""
    model: dict[str, int]
    """Of the random language model."""
    documents: int
    harvested: int
    embedded: int
    """Rows harvested of the random model, and of the embedded one; 0: that one is left out."""
    tests: tuple[str, ...]


FULL = Sizes(
    d=2304,
    k=96,
    square=8192,
    steps=tuple((batch, latents) for latents in (18_432, 65_536, 262_144) for batch in (1024, 4096, 16_384)),
    latents=18_432,
    rows=65_536,
    batches=(1024, 4096),
    turn=100,
    model={"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "head_dim": 256},
    documents=30_000,
    harvested=150_000,
    embedded=150_000,
    tests=TESTS,
)
SMALL = Sizes(
    d=32,
    k=8,
    square=64,
    steps=((128, 256),),
    latents=256,
    rows=2048,
    batches=(64,),
    turn=3,
    model={"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16},
    documents=400,
    harvested=4096,
    embedded=0,
    tests=(f"{TESTS[0]}::test_a_replacement_is_written_where_rows_are",),
)
Part = Callable[[torch.device, Sizes], dict[str, Any]]


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of `REPEATS` runs, each waited for; two before them warm up."""
    taken = []
    for _ in range(REPEATS + 2):
        wait(device)
        begun = time.perf_counter()
        run()
        wait(device)
        taken.append(1000 * (time.perf_counter() - begun))
    return statistics.median(taken[2:])


def ceilings(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The device's own: copies, and products of square matrices in each precision."""
    n = sizes.square
    a = torch.randn(n * n, device=device)
    b = torch.empty_like(a)
    figures = {"copy, TB/s": 8 * n * n / milliseconds(lambda: b.copy_(a), device) / 1e9}
    for precision in PRECISIONS:
        square = (a.bfloat16() if precision == "bfloat16" else a).view(n, n)
        with tensor_cores(precision):
            taken = milliseconds(lambda square=square: square @ square, device)
        figures[f"{precision}, TFLOP/s"] = 2 * n**3 / taken / 1e9
    return figures


def step(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Milliseconds of a step, without and with 5 % dead latents, and of its floor."""
    results = {}
    for batch, d_sae in sizes.steps:
        for precision in PRECISIONS:
            if precision == "tfloat32" and device.type == "cpu":
                continue
            objective = _objective(d_sae, sizes.k, precision)
            name = f"{precision}, batch {batch:,}, {objective.d_sae:,} latents"
            try:
                results[name] = _step(objective, device, batch, sizes.d)
            except torch.cuda.OutOfMemoryError:
                results[name] = {"did not fit": 1}
            print(name, results[name], flush=True)
    return results


def _objective(d_sae: int, k: int, precision: str) -> Objective:
    ends = tuple(accumulate(share * d_sae // sum(GROUPS) for share in GROUPS))
    return Objective(ends, prefix_weights(len(GROUPS)), k, "batch_topk", 512, 1.0, precision)


def _step(objective: Objective, device: torch.device, batch: int, d: int) -> dict[str, float]:
    parameters = initialise(d, objective.d_sae, torch.zeros(d), skip=False, seed=0).map(
        lambda t: t.to(device)
    )
    x, y = rows(batch, d, 1).to(device), rows(batch, d, 2).to(device)
    adam, compute = Adam(parameters, objective.prefix_ends), step_for(objective, device)
    measured: dict[str, float] = {}

    @torch.no_grad()
    def once(dead: torch.Tensor) -> None:
        _, gradients = compute(adam.parameters, x, y, dead, objective.k)
        apply(adam, gradients, 1e-4)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for name, n_dead in (("step, ms", 0), ("step with 5 % dead, ms", objective.d_sae // 20)):
        dead = torch.linspace(0, objective.d_sae - 1, n_dead, device=device).long()
        measured[name] = milliseconds(lambda dead=dead: once(dead), device)
    if device.type == "cuda":
        measured["peak memory, GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
        _profile(once, dead, f"{objective.precision}_{batch}_{objective.d_sae}")
    low = torch.bfloat16 if objective.precision == "bfloat16" else torch.float32
    with tensor_cores(objective.precision):
        measured["floor, ms"] = milliseconds(floor(parameters, x, low), device)
    measured["step / floor"] = measured["step, ms"] / measured["floor, ms"]
    return {name: round(value, 3) for name, value in measured.items()}


def _profile(once: Callable[[torch.Tensor], None], dead: torch.Tensor, name: str) -> None:
    """The fifteen kernels that take longest, as a text file."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        once(dead)
        torch.cuda.synchronize()
    text = profiler.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=15, max_name_column_width=60
    )
    (RESULTS.parent / "profiles").mkdir(exist_ok=True, parents=True)
    (RESULTS.parent / "profiles" / f"{name}.txt").write_text(text, encoding="utf-8")


def made_store(scratch: str, sizes: Sizes) -> Store:
    """Normal rows, int8. Inputs are outputs too: only their sizes matter here."""
    rng = np.random.default_rng(0)
    train, heldout = (
        rng.standard_normal((n, sizes.d), dtype=np.float32) for n in (sizes.rows, sizes.rows // 4)
    )
    path = Path(scratch) / "made" / "layer_0.zarr"
    return make_store(path, (train, train), (heldout, heldout), storage="int8", model="made/rows")


def made_settings(scratch: str, sizes: Sizes, run: str, batch: int, *more: str) -> Settings:
    """Of a run on that store."""
    options = (
        f"--layer 0 --model.name made/rows --wandb.mode disabled --paths.checkpoints {scratch}/runs --run {run} "
        f"--train.lr 1e-5 --train.rows {batch * 100_000} --train.batch_size {batch} --transcoder.k {sizes.k} "
        f"--transcoder.d_sae {sizes.latents} "
        f"--transcoder.group_sizes {sizes.latents // 4},{sizes.latents * 3 // 4}"
    )
    return load(parser("bench.gpu", ""), [*options.split(), *more])[0]


def loader(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Rows per second of one epoch, on the host and on the device, and of copying the stored bytes to it."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        train = made_store(scratch, sizes).train
        for batch in sizes.batches:
            places = {"on the host": torch.device("cpu"), "on the device": device}
            rates: dict[str, list[float]] = {place: [] for place in places}
            for _ in range(TURNS):
                for place, where in places.items():
                    begun = time.perf_counter()
                    rows = sum(len(x) for x, _ in train.loader(batch, epochs=2, device=where))
                    wait(where)
                    rates[place].append(rows / (time.perf_counter() - begun))
            figures = {f"{place}, rows/s": statistics.median(rate) for place, rate in rates.items()}
            stored = torch.zeros(batch, 2 * sizes.d, dtype=torch.int8)
            stored = stored.pin_memory() if device.type == "cuda" else stored
            figures["copy alone, rows/s"] = (
                1000 * batch / milliseconds(lambda held=stored: held.to(device), device)
            )
            results[f"batch {batch:,}"] = {name: round(value) for name, value in figures.items()}
    return results


def loop(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Rows per second of the whole loop (loader, log, probes, samples) beside the bare step on one batch."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        store = made_store(scratch, sizes)
        for batch in sizes.batches:
            settings = made_settings(scratch, sizes, f"b{batch}", batch)
            results[f"batch {batch:,}"] = _loop(settings, store, device, sizes.turn)
    return results


def _loop(settings: Settings, store: Store, device: torch.device, turn: int) -> dict[str, float]:
    bare, whole, waiting = alternate(Run(settings, store, device), turn)
    figures = {"bare step, ms": 1000 * bare, "loop, ms": 1000 * whole, "loop / step": whole / bare}
    figures |= {"waiting for data, ms": 1000 * waiting, "rows/s": settings.train.batch_size / whole}
    return {name: round(value, 3) for name, value in figures.items()}


def resume(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Of a run that is stopped after half of its steps and goes on, and of one that is not: tensors that differ."""
    results, batch = {}, sizes.batches[0]
    steps = 2 * sizes.turn
    with tempfile.TemporaryDirectory() as scratch:
        store = made_store(scratch, sizes)
        for precision in PRECISIONS:
            if precision == "tfloat32" and device.type == "cpu":
                continue
            whole, parts = (
                made_settings(scratch, sizes, f"{run}_{precision}", batch, "--train.precision", precision)
                for run in ("whole", "parts")
            )
            expected = fed(whole, store, device, steps)
            fed(parts, store, device, steps // 2)
            found = fed(parts, store, device, steps - steps // 2)
            differ = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
            results[precision] = {
                "steps": steps,
                "tensors": len(expected),
                "tensors that differ": len(differ),
            }
    return results


def fed(settings: Settings, store: Store, device: torch.device, steps: int) -> dict[str, torch.Tensor]:
    """The state, on the CPU, after so many more steps of a run; they are in its checkpoint."""
    run = Run(settings, store, device)
    assert run.log is not None
    train, state = settings.train, run.state
    loader = store.train.loader(
        train.batch_size, train.order_seed, state.epoch, state.batch, epochs=None, device=device
    )
    with closing(run.log), closing(loader.batches()) as batches:
        for _ in range(steps):
            run.feed(next(batches), loader.batches_per_epoch, 0.0)
        run.save()
    return {name: tensor.cpu() for name, tensor in state.tensors().items()}


def harvest(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Tokens per second of a harvest beside the bare forward pass: Gemma-2-2B's widths, 4 layers, random weights; and
    the embedded model on its text.
    """
    layers = {"num_hidden_layers": 4, "num_key_value_heads": 4}
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = save_model(Path(scratch) / "gemma", "gemma2", dtype=torch.bfloat16, **sizes.model | layers)
        text = write_jsonl(Path(scratch) / "text.jsonl", sentences(sizes.documents, words=40))
        options = (
            f"--layer 2 --model.name {model} --data.files {text} --data.pack concat --model.device {device} "
            f"--harvest.context_length 64 --harvest.heldout_fraction 0.1 --harvest.batch_size 64 "
            f"--harvest.rows {sizes.harvested}"
        )
        results["random Gemma-2, 4 layers"] = bench_harvest.speed(Path(scratch) / "random", options.split())
        if sizes.embedded:
            options = f"--profile demo --model.device {device} --harvest.rows {sizes.embedded}"
            try:
                own = bench_harvest.speed(Path(scratch) / "embedded", options.split())
                results["the demo's model, one layer"] = own
            except InputError as error:
                print(f"the demo's model is left out: {error}", file=sys.stderr)
    return results


@torch.inference_mode()
def evaluation(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Rows per second of both passes beside encoding and decoding rows that are there, and seconds of the rest."""
    with tempfile.TemporaryDirectory() as scratch:
        store = made_store(scratch, sizes)
        split, moments = store.heldout, store.manifest.splits["heldout"].outputs
        assert moments is not None
        coder, n = random_coder(store, sizes).to(device), len(store.heldout)
        resident = split.rows(0, min(n, 1024))[0].to(device)
        text, clock = TokenText(read_tokenizer(store.tokenizer_path)), Clock(device)
        baselines = Baselines(fit_ridge(store.train, device=device))
        clock.lap("linear map, s")
        select, tick = training_selection("batch_topk", sizes.k), lambda _: None
        first = first_pass(coder, split, n, select, baselines, moments, text.size, tick)
        rates = {"first pass, rows/s": n / clock.lap("first pass, s")}
        words = Words(text, split.contexts)
        firings = first.measurement.prefixes[-1].firing.firings.cpu().numpy()
        measured = Measured(choose(first.sampled, firings, split, n, words), split.contexts, words, device)
        clock.lap("labels, s")
        second_pass(coder, split, n, first, measured, tick)
        rates["second pass, rows/s"] = n / clock.lap("second pass, s")
        decoder_similarity(coder.W_dec, coder.prefix_ends)
        clock.lap("redundancy, s")
        first.coactivation.partners(coder.prefix_ends)
        clock.lap("partners, s")
        bare = 1000 * len(resident) / milliseconds(lambda: coder(resident), device)
    return {name: round(value, 3) for name, value in (clock.seconds | rates | {"bare, rows/s": bare}).items()}


class Clock:
    """Seconds by name; a lap ends when the device has done what was queued."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._begun = device, {}, time.perf_counter()

    def lap(self, name: str) -> float:
        wait(self.device)
        now = time.perf_counter()
        self.seconds[name], self._begun = now - self._begun, now
        return self.seconds[name]


def random_coder(store: Store, sizes: Sizes) -> Transcoder:
    """Random parameters, and the threshold that keeps about k latents a row."""
    ends = _objective(sizes.latents, sizes.k, "float32").prefix_ends
    parameters = initialise(sizes.d, ends[-1], torch.zeros(sizes.d), skip=False, seed=0)
    x = store.heldout.rows(0, min(len(store.heldout), 256))[0]
    cut = kth_largest((x @ parameters.W_enc.T).flatten(), sizes.k * len(x))
    return Transcoder(parameters, cut.expand(len(ends)).clone(), ends, {})


def tests(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The tests of the fake device on this one; what counts kernels and waits is skipped, as a GPU counts none."""
    env = os.environ | ({"TEST_DEVICE": str(device)} if device.type == "cuda" else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes.tests]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False)
    if process.returncode:
        print(process.stdout, file=sys.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", process.stdout.splitlines()[-1])
    return {outcome: int(number) for number, outcome in counts}


def peers(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Our step and those of the other tools at one shape, where their environment is (make install-peers)."""
    python = Path(os.environ.get("PEERS", ROOT / ".venv-peers")) / "bin" / "python"
    results: dict[str, Any] = {}
    if not python.exists():
        print(f"{python}: not there (make install-peers), so the other tools are left out", file=sys.stderr)
    for precision in ("float32",) if device.type == "cpu" else ("float32", "tfloat32"):
        objective, batch = _objective(sizes.latents, sizes.k, precision), sizes.batches[-1]
        ours = _step(objective, device, batch, sizes.d)
        results[f"ours, {precision}, batch {batch:,}"] = {"step, ms": ours["step, ms"]}
        ends = ",".join(map(str, objective.prefix_ends))
        for tool in ("sparsify", "saelens") if python.exists() else ():
            numbers = (batch, sizes.d, objective.d_sae, sizes.k, ends, REPEATS)
            command = [python, "-P", PEER, tool, device, precision, *numbers]
            process = subprocess.run(
                [*map(str, command)], cwd=PEER.parent, capture_output=True, encoding="utf-8", check=False,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            )  # fmt: skip
            if process.returncode:
                print(f"{tool} is left out:", *process.stderr.splitlines()[-1:], file=sys.stderr)
            else:
                results[f"{tool}, {precision}, batch {batch:,}"] = json.loads(process.stdout.splitlines()[-1])
    return results


PARTS: dict[str, Part] = {
    "tests": tests,
    "ceilings": ceilings,
    "step": step,
    "loader": loader,
    "loop": loop,
    "resume": resume,
    "harvest": harvest,
    "evaluation": evaluation,
    "peers": peers,
}
