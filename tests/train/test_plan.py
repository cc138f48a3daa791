"""What splits of a training take, by the plan; what really is sent is in step/test_mesh.py and test_processes.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import scale
from common.errors import InputError
from common.settings import ROOT, Settings
from shards.plan import human
from tests.fixtures import make_store
from tests.objects import bucket
from tests.train.runs import D_IN, D_OUT, sparse_rows, tiny_settings
from train.plan import memory
from train.plan.__main__ import main as plan_command
from train.plan.splits import Split, plan, splits, table_of
from train.recipe import objective_of
from train.step.losses import Objective

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OBJECTIVE = Objective((512, 4096, 16385), (1 / 3,) * 3, 32, "batch_topk", 16, 0.125)


def of(rows: int, latents: int, found: list[Split]) -> Split:
    return next(each for each in found if (each.rows, each.latents) == (rows, latents))


def test_a_split_holds_its_latents_and_sends_what_the_others_need() -> None:
    d_in, d_out, batch, k = 24, 20, 256, 32
    found = splits(OBJECTIVE, d_in, d_out, batch, 8, CPU, samples=False)
    assert [(each.rows, each.latents) for each in found] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    alone = of(1, 1, splits(OBJECTIVE, d_in, d_out, batch, 1, CPU, samples=False))
    assert (alone.sent, alone.state) == (0, memory.kept(OBJECTIVE, d_in, d_out))
    whole = of(8, 1, found)
    assert whole.sent_for_rows == 4 * (16385 * (d_in + d_out + 3) + d_out)
    assert whole.sent_for_latents == 4 * int(1.25 * k * batch / 8)  # the candidates of the cut alone
    eighths = of(1, 8, found)
    assert eighths.sent_for_rows == 0
    assert eighths.sent_for_latents == 4 * (batch * 3 * d_out + int(1.25 * k * batch))
    assert (
        0 < eighths.state - alone.state / 8 < 4 * 3 * (d_in + d_out + 1) + 4 * 3 * d_out + 12
    )  # a latent more


def test_what_fits_and_sends_the_least_is_named() -> None:
    found = splits(OBJECTIVE, 24, 20, 4096, 4, CPU)
    texts = [
        str(table_of(found, each, "x", 4096).caption) for each in (1e15, float(of(1, 4, found).together), 1.0)
    ]
    assert texts[0].endswith(f"latent_shards {min(found, key=lambda split: split.sent).latents}")
    assert texts[1].endswith("latent_shards 4")
    assert texts[2].startswith("none fits")


def test_the_plan_of_a_stores_settings(store_root: Path, tmp_path: Path) -> None:
    settings = tiny_settings(store_root, tmp_path)
    table = plan(settings, D_IN, 6, 1e9, "training of layer 0")
    assert "64 latents, width 12" in table.title
    assert [row[0] for row in table.rows] == ["2 x 3", "1 x 6"]
    assert str(table.caption).endswith("\nleft out: 64 rows are not shared by 3, 6 processes")
    assert D_OUT != D_IN


@pytest.mark.parametrize(
    ("more", "code", "line"),
    [
        (
            ("--width", "576", "--nproc", "4", "--nodes", "2", "--memory", "80GB"),
            0,
            "rows, tfloat32; 8 GPUs, 80 GB each",
        ),
        (
            ("--width", "576", "--memory", "1e9", "--model.device", "cpu"),
            0,
            "rows, float32; one process on a CPU, 1 GB",
        ),
        (("--width", "576", "--memory", "80XB"), 2, "expected bytes, for example 80e9 or 80GB, found '80XB'"),
        (
            ("--width", "576", "--memory", "inf"),
            2,
            "(--memory): expected bytes, for example 80e9 or 80GB, found 'inf'",
        ),
        (("--width", "576", "--memory", "80"), 2, "expected bytes, for example 80e9 or 80GB, found '80'"),
        (("--width", "576", "--nodes", "0"), 2, "(--nodes): expected a whole number, 1 or more, found '0'"),
        ((), 0, "no store yet, so the width of its rows is not known; give it (WIDTH=2304 for Gemma-2-2B)"),
        (("--width", "576", "--nproc", "4"), 0, "--train.latent_shards 4"),
        (("--width", "577"), 2, "transcoder: size 0.5x of d_in 577 is 288.5, not a whole number of latents"),
        (("--width", "576", "--nproc", "7919"), 2, "7,919 processes cannot share batches of"),
        (
            ("--width", "576", "--nproc", "9999999", "--nodes", "9999999"),
            2,
            "expected fewer than 1,048,576 processes together, found 99,999,980,000,001",
        ),
        (
            ("--paths.activations", "file:///not/there"),
            0,
            "no store yet, so the width of its rows is not known; give it",
        ),
        (("--width", "-3"), 2, "(--width): expected a whole number, 1 or more, found '-3'"),
    ],
)
def test_the_command(more: tuple[str, ...], code: int, line: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "train.plan",
        "--layer",
        "1",
        "--paths.activations",
        str(tmp_path),
        *more,
    ]
    process = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr
    assert line in " ".join((process.stdout + process.stderr).split())  # whatever the terminal's width


def test_the_width_is_that_of_any_layer_with_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers of which only the second is harvested; in a bucket without a store there is none."""
    make_store(tmp_path / "tiny/layer_1.zarr", sparse_rows(64, 0), sparse_rows(16, 1), layer=1, n_layers=2)
    sizes = ["--transcoder.d_sae", "64", "--transcoder.group_sizes", "8,16,40", "--transcoder.k", "4"]
    model = ["--model.name", "tests/tiny", "--model.device", "cpu"]
    for place, line in (
        (str(tmp_path), f"width {D_IN}"),
        ("s3://bucket/acts", "training of layer 0 1: no store yet"),
    ):
        command = ["train.plan", "--layer", "0-1", *model, *sizes, "--paths.activations", place]
        monkeypatch.setattr(sys, "argv", command)
        with bucket():
            plan_command()
        assert line in capsys.readouterr().out


def test_given_memory_is_a_gpus(store_root: Path, tmp_path: Path) -> None:
    """Also on a machine without one: the figures of the steps that were measured on an H100, in TF32."""
    settings = tiny_settings(store_root, tmp_path)
    anywhere = settings.model_copy(update={"model": settings.model.model_copy(update={"device": "auto"})})
    table = plan(anywhere, D_IN, 1, 1e9, "x")
    (own,) = splits(objective_of(in_tf32(settings), D_IN, GPU), D_IN, D_IN, 64, 1, GPU)
    assert "64 rows, tfloat32; one GPU, 1 GB" in table.title
    assert table.rows[0][1:5] == tuple(map(human, (own.state, own.step, own.together, 0)))
    (cpu,) = splits(objective_of(settings, D_IN, CPU), D_IN, D_IN, 64, 1, CPU)
    assert own.step > cpu.step


def in_tf32(settings: Settings) -> Settings:
    train = settings.train.model_copy(update={"precision": "tfloat32"})
    return settings.model_copy(update={"train": train})


def test_processes_of_a_cpu_share_its_memory_and_each_has_a_program(
    store_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda _: 8 * 10**9)
    settings = tiny_settings(store_root, tmp_path)
    titles = [plan(settings, D_IN, processes, None, "x", nodes) for processes, nodes in ((4, 2), (16, 1))]
    assert "8 processes on CPUs, 2 GB each" in titles[0].title
    assert {row[-1] for row in titles[0].rows} == {"fits"}
    assert "16 processes on CPUs, 500 MB each" in titles[1].title
    assert {row[3] for row in titles[1].rows} == {"966 MB"}
    assert (
        titles[1].caption == "none fits; use fewer processes on a machine, fewer latents, or smaller batches"
    )


def test_the_fit_gives_the_steps_that_were_measured() -> None:
    fit = scale.fitted()
    (device,) = json.loads((ROOT / "bench" / "results" / "gpu.json").read_text()).values()
    for batch, latents in ((1024, 18_432), (16_384, 18_432), (4096, 262_144)):
        seconds = device["step"][f"tfloat32, batch {batch:,}, {latents:,} latents"]["step, ms"] / 1e3
        assert float(scale._terms(batch, latents) @ fit) == pytest.approx(seconds, rel=0.03)


def test_what_is_derived_fits_and_gains_by_more_processes() -> None:
    for d_sae, by_processes in scale.derived().items():
        seconds = [of_split for _, of_split in by_processes.values()]
        assert seconds == sorted(seconds, reverse=True), d_sae
        assert all(split.together <= scale.MEMORY for split, _ in by_processes.values())
        assert 64 in by_processes


def test_more_processes_than_chunks_of_a_batch_share_no_rows(store_root: Path, tmp_path: Path) -> None:
    """A loader takes a batch of 32 chunks at most: what training refuses, no plan says that it fits."""
    meshes = [(s.rows, s.latents) for s in splits(OBJECTIVE, 24, 20, 16384, 96, CPU)]
    assert meshes == [(32, 3), (16, 6), (8, 12), (4, 24), (2, 48), (1, 96)]
    settings = tiny_settings(store_root, tmp_path, train__batch_size=65536, train__rows=65536)
    with pytest.raises(InputError, match=r"train\.batch_size 65536: a batch takes .*; use 32768"):
        plan(settings, D_IN, 4, 1e9, "x")
