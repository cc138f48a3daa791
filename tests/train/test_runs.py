"""Whole runs on a small store: determinism, resume, refusals, files."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.settings import ROOT, Settings
from shards import Store
from tests.fixtures import make_store
from tests.train.runs import D_IN, command, sparse_rows, tensors
from train import record
from train.__main__ import main
from train.finish import summary
from train.loop import RESTRAINT, Run, restrain, step_for, train, train_step, train_together
from train.normalisation import fold
from train.recipe import Recipe, initial
from train.state import State
from train.step.schedule import active_latents, peak_rate
from transcoder import Transcoder
from transcoder.heavy import Typical, typical_rows
from transcoder.weights import read_metadata

TIMING = ("rows_per_second", "data_wait_seconds", "peak_memory_bytes")
Make = Callable[..., Settings]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(run_dir: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMING} for line in metrics(run_dir)]


def assert_same_run(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert untimed(a) == untimed(b)


def test_a_run_learns_and_its_prefixes_are_ordered(finished: Path) -> None:
    t = Transcoder.load(finished)
    fvu, l0 = t.metadata["heldout"]["fvu"], t.metadata["heldout"]["l0"]
    assert fvu[0] > fvu[1] > fvu[2]
    assert fvu[2] < 0.85
    assert l0[2] == pytest.approx(4, rel=0.1)
    torch.testing.assert_close(t.W_dec.norm(dim=1), torch.ones(64))
    assert t.metadata["training"]["l0"][2] == pytest.approx(4, rel=1e-3)


def test_what_a_run_writes(finished: Path, store: Store) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 96]
    names = {
        "step", "rows", "loss", "l2_loss", "aux_loss", "l0_norm", "fvu", "fvu/prefix_0", "fvu/prefix_2",
        "dead_features_percentage", "learning_rate", "threshold", "rows_per_second", "data_wait_seconds",
        "peak_memory_bytes",
    }  # fmt: skip
    assert all(names <= set(line) for line in lines)
    probed = [line["step"] for line in lines if "heldout_fvu/prefix_2" in line]
    assert probed == [40, 80, 96]
    assert lines[-1]["learning_rate"] == pytest.approx(3e-5)
    assert lines[0]["rows"] == 640
    metadata = Transcoder.load(finished).metadata
    assert metadata["harvest_fingerprint"] == store.manifest.fingerprint
    assert metadata["settings"]["train"]["lr"] == 3e-3
    assert set(metadata["versions"]) >= {"torch", "safetensors"}
    peak = lines[-1]["peak_memory_bytes"]
    assert 2**26 < peak < 2**36
    assert "peak_memory_bytes" not in metadata["training"]  # a run that was killed has the same file
    assert str(summary(read_metadata(finished), peak).caption).endswith(f"peak memory {peak / 2**30:.1f} GiB")
    states = [path.name for path in (finished / "state").iterdir()]
    assert sorted(states) == ["latest", "step_96"]
    assert not [path for path in finished.rglob("*") if path.suffix in {".tmp", ".pt", ".pkl", ".npy"}]


def test_training_fvu_is_against_the_stores_variance(finished: Path, store: Store) -> None:
    """The mean of the outputs has FVU 1 on average; the first steps are near it."""
    assert 0.5 < metrics(finished)[0]["fvu"] < 1.5


def test_two_runs_are_bit_identical(make_settings: Make, store: Store, finished: Path) -> None:
    train(make_settings(), store)
    assert_same_run(make_settings().run_dir(), finished)


def test_another_seed_is_another_run(make_settings: Make, store: Store, finished: Path) -> None:
    train(make_settings(run="seed", train__seed=1), store)
    other = tensors(make_settings(run="seed").run_dir())
    assert not torch.equal(other["W_enc"], tensors(finished)["W_enc"])


@pytest.mark.parametrize("stop", [7, 20, 33, 96])
def test_a_stopped_run_continues_bit_identically(
    make_settings: Make, store: Store, finished: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between checkpoints, at one, and after the last step but before the weights' file."""
    feed, settings = Run.feed, make_settings()

    def stopping(self: Run, *args: object) -> None:
        feed(self, *args)
        if self.state.step == stop:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Run, "feed", stopping)
        with pytest.raises(SystemExit):
            train(settings, store)
    assert not (settings.run_dir() / "transcoder.safetensors").exists()
    train(settings, store)
    assert_same_run(settings.run_dir(), finished)


def interrupted(settings: Settings, store: Store, stop: int) -> None:
    """Train until step `stop`, where a checkpoint is written, as after Ctrl-C."""
    run = Run(settings, store, torch.device("cpu"))
    batches = store.train.loader(64, epochs=None).batches()
    for _ in range(stop):
        run.feed(next(batches), 64, 0.0)
    run.save()
    batches.close()
    assert run.log is not None
    run.log.close()


@pytest.mark.parametrize(("before", "after"), [(5, 3), (0, 5), (5, 0)])
def test_what_is_logged_and_sampled_may_change_while_a_run_goes_on(
    make_settings: Make, store: Store, finished: Path, before: int, after: int
) -> None:
    """The weights are those of the uninterrupted run; samples stay, or are collected from then on."""
    interrupted(make_settings(train__sample_every=before), store, 60)
    again = make_settings(
        train__log_every=7, train__heldout_every=30, train__sample_every=after, train__checkpoint_every=50
    )
    train(again, store)
    own, others = tensors(again.run_dir()), tensors(finished)
    assert all(torch.equal(own[name], others[name]) for name in own)
    lines = metrics(again.run_dir())
    assert [line["step"] for line in lines if line["step"] > 60] == [63, 70, 77, 84, 90, 91, 96]
    assert [line["step"] for line in lines if "heldout_fvu/prefix_2" in line] == [40, 90, 96]
    assert record.finished(again.run_dir(), make_settings(), store.manifest.fingerprint) is not None
    samples = (again.run_dir() / "activation_samples/samples.jsonl").read_text().splitlines()
    assert len(samples) == 64
    assert any(json.loads(line)["samples"] for line in samples)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        file = run_dir / "metrics.jsonl"
        if file.exists() and any(line["step"] >= step for line in metrics_so_far(file)):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.stderr and process.stderr.read()}")


def metrics_so_far(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_same_command_continues_after_a_signal(
    make_settings: Make, store: Store, finished: Path, number: signal.Signals
) -> None:
    settings = make_settings()
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command(settings), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env) as first:
        wait_for_step(settings.run_dir(), 30, first)
        first.send_signal(number)
        error = first.communicate()[1]
    assert first.returncode == (-9 if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert error.strip().splitlines()[-1].endswith("the same command continues")
    again = subprocess.run(command(settings), cwd=ROOT, capture_output=True, text=True, env=env, check=True)
    assert "FVU" in again.stdout
    assert_same_run(settings.run_dir(), finished)
    third = subprocess.run(command(settings), cwd=ROOT, capture_output=True, text=True, env=env, check=True)
    assert "already trained on 6,144 rows, nothing to do" in third.stdout


def test_a_finished_run_is_known_without_its_store(make_settings: Make, finished: Path) -> None:
    settings = Settings.model_validate(json.loads((finished / "settings.json").read_text())["settings"])
    metadata = record.finished(finished, settings, None)
    assert metadata is not None
    assert metadata["training"]["steps"] == 96


def test_a_finished_run_is_not_that_of_another_harvest(
    make_settings: Make, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With HARVEST=other the run of the first harvest is refused, and kept; without any store it is still shown."""
    settings = make_settings(train__rows=640)
    train(settings, store)
    weights = (settings.run_dir() / "transcoder.safetensors").read_bytes()
    options = command(settings)[3:]
    other = Path(settings.store_path(settings.layer)).with_name(f"layer_{settings.layer}_other.zarr")
    make_store(other, sparse_rows(1024, 4), sparse_rows(64, 5))
    monkeypatch.setattr("sys.argv", ["train", *options, "--harvest", "other"])
    with pytest.raises(InputError, match="harvest was"):
        main()
    assert (settings.run_dir() / "transcoder.safetensors").read_bytes() == weights
    monkeypatch.setattr("sys.argv", ["train", *options, "--harvest", "gone"])
    main()
    assert "no store at" in capsys.readouterr().out


def test_other_settings_under_the_same_name_are_refused(
    make_settings: Make, store: Store, finished: Path
) -> None:
    settings = Settings.model_validate(json.loads((finished / "settings.json").read_text())["settings"])
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"lr": 1e-3, "seed": 5})})
    with pytest.raises(InputError, match=r"train.lr was 0.003, asked 0.001; train.seed was 0, asked 5"):
        record.finished(finished, other, None)
    with pytest.raises(InputError, match="harvest was"):
        record.finished(finished, settings, "0" * 64)
    fewer = settings.model_copy(update={"train": settings.train.model_copy(update={"rows": 640})})
    with pytest.raises(InputError, match=r"train.rows was 6144, asked 640"):
        record.finished(finished, fewer, None)


def test_more_rows_continue_a_finished_run(make_settings: Make, store: Store) -> None:
    train(make_settings(), store)
    longer = make_settings(train__rows=64 * 130)
    assert record.finished(longer.run_dir(), longer, store.manifest.fingerprint) is None
    train(longer, store)
    assert [line["step"] for line in metrics(longer.run_dir())][-4:] == [100, 110, 120, 130]
    assert Transcoder.load(longer.run_dir()).metadata["training"]["steps"] == 130
    assert record.finished(longer.run_dir(), longer, store.manifest.fingerprint) is not None


def test_init_from_starts_at_the_other_runs_weights(
    make_settings: Make, store: Store, finished: Path
) -> None:
    run = Run(make_settings(run="warm", train__init_from=str(finished)), store, torch.device("cpu"))
    folded = fold(run.state.parameters, run.recipe.scaling)
    for name, tensor in Transcoder.load(finished).parameters.named().items():
        torch.testing.assert_close(folded.named()[name], tensor, rtol=1e-5, atol=1e-6)
    assert run.log is not None
    run.log.close()
    with pytest.raises(InputError, match=r"prefix ends: expected \(8, 64\), found \(8, 24, 64\)"):
        Run(
            make_settings(run="other", train__init_from=str(finished), transcoder__group_sizes=(8, 56)),
            store,
            torch.device("cpu"),
        )


def test_a_final_rate_above_the_rules_peak_is_refused(make_settings: Make, store: Store) -> None:
    settings = make_settings(train__lr="auto", train__min_lr=1.0)
    with pytest.raises(InputError, match=r"train: min_lr 1 is above lr 0\.407\d+; lower train\.min_lr"):
        train(settings, store)
    assert not settings.run_dir().exists()


def test_init_from_a_run_of_the_other_convention_is_converted(
    make_settings: Make, finished: Path, tmp_path: Path
) -> None:
    """A run on normalized inputs starts one on inputs with the gain as the same function of its own inputs."""
    gain = [0.5, -2.0] * (D_IN // 2)
    rows = sparse_rows(1100, 2)
    with_gain = make_store(
        tmp_path / "gain" / "tiny" / "layer_0.zarr",
        (rows[0] * np.float32(gain), rows[1]),
        sparse_rows(10, 3),
        gain=gain,
        input="mlp_in",
        input_hook="blocks.0.mlp.hook_in",
    )
    settings = make_settings(run="warm", train__init_from=str(finished))
    run = Run(settings, with_gain, torch.device("cpu"))
    assert run.log is not None
    run.log.close()
    start, own = fold(run.state.parameters, run.recipe.scaling), Transcoder.load(finished)
    expected = own.W_enc / torch.tensor(gain)
    torch.testing.assert_close(start.W_enc, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(start.b_enc, own.b_enc, rtol=1e-4, atol=1e-4)


def test_a_damaged_or_foreign_checkpoint_is_refused(make_settings: Make, store: Store) -> None:
    settings = make_settings(train__rows=64 * 20)
    train(settings, store)
    folder = record.latest(settings.run_dir())
    assert folder is not None
    (folder / "tensors.safetensors").write_bytes(b"cut short")
    with pytest.raises(
        InputError, match=r"step_20: not a readable checkpoint.*to train again from the start"
    ):
        Run(settings, store, torch.device("cpu"))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(InputError, match="expected checkpoint version 5, found 99"):
        Run(settings, store, torch.device("cpu"))


def test_a_checkpoint_of_the_old_normalisation_is_refused_and_left_as_it_is(
    make_settings: Make, store: Store
) -> None:
    """Its numbers mean other weights now: continuing it would change the run without a word."""
    settings = make_settings(train__rows=64 * 20)
    train(settings, store)
    folder = record.latest(settings.run_dir())
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"version": 1}))
    before = {path: path.read_bytes() for path in settings.run_dir().rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"expected checkpoint version 5, found 1; remove .* to train again"):
        train(make_settings(train__rows=64 * 40), store)
    assert {path: path.read_bytes() for path in before} == before


def test_what_auto_stood_for_is_recorded(make_settings: Make, store: Store) -> None:
    settings = make_settings(train__lr="auto", train__min_lr="auto", train__warmup_steps=1000)
    train(settings, store)
    used = Transcoder.load(settings.run_dir()).metadata["used"]
    assert used["lr"] == pytest.approx(peak_rate(D_IN, 64, 96))
    assert used["min_lr"] == pytest.approx(peak_rate(D_IN, 64, 96) / 100)
    assert used["warmup_steps"] == 48
    assert used["normalisation"].startswith("inputs centred")
    assert json.loads((settings.run_dir() / "settings.json").read_text())["used"] == used


@pytest.mark.parametrize(("dead_after", "said"), [(1500, False), (1, True)])
def test_many_dead_latents_are_told_once_after_a_quarter(
    make_settings: Make, store: Store, capsys: pytest.CaptureFixture[str], dead_after: int, said: bool
) -> None:
    settings = make_settings(train__dead_after_rows=dead_after)
    train(settings, store)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == said
    if said:
        assert re.search(r"after a quarter of the run \d+ % of the latents are dead", lines[0])
        assert "a lower train.lr (it is 0.003)" in lines[0]


def test_a_run_that_diverges_is_told_after_a_quarter(
    make_settings: Make, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_settings(train__lr=3.0), store)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert re.search(
        r"after a quarter of the run FVU [\d.]+: worse than the mean output; .* lower train.lr", lines[0]
    )


def test_a_bias_falls_in_proportion_to_the_excess_over_the_density_limit(
    make_settings: Make, store: Store
) -> None:
    run = Run(make_settings(), store, torch.device("cpu"))
    assert run.log is not None
    run.log.close()
    run.state.density[:4] = torch.tensor([0.09, 0.0899, 0.135, 0.9])
    before = run.state.parameters.b_enc.clone()
    restrain(run.state, 0.1, lr=1e-3)
    fallen = (before - run.state.parameters.b_enc) / (RESTRAINT * 1e-3 * D_IN**0.5 / 2)
    assert fallen[:4].tolist() == pytest.approx([0.0, 0.0, 0.5, 2.0], abs=1e-3)
    assert not fallen[4:].any()


def test_few_latents_fire_above_the_density_limit(make_settings: Make, store: Store) -> None:
    density = {}
    for name, limit in (("free", None), ("limited", 0.12)):
        settings = make_settings(run=name, train__density_limit=limit, train__rows=64 * 400)
        train(settings, store)
        acts = Transcoder.load(settings.run_dir()).encode(store.train.rows(0, 4096)[0])
        density[name] = (acts > 0).double().mean(0)
    assert int((density["free"] > 0.14).sum()) > 2 * int((density["limited"] > 0.14).sum())
    assert float(density["limited"].max()) < 0.16
    assert float(density["limited"].sum()) == pytest.approx(float(density["free"].sum()), rel=0.1)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_the_mean_of_the_rows_has_no_say(make_settings: Make, tmp_path: Path, storage: str) -> None:
    """99 % of the energy in the means: the same held-out FVU to 1 %, and as many latents that never fire."""
    heldout = {}
    for name, share in (("without", 0.0), ("with", 0.99)):
        splits = []
        for n, seed in ((4096, 2), (1024, 3)):
            rows = []
            for side in sparse_rows(n, seed):
                centred = side - sparse_rows(4096, 2)[len(rows)].mean(0)
                energy = sparse_rows(4096, 2)[len(rows)].var(0).sum() * share / (1 - share)
                direction = np.random.default_rng(9).standard_normal(side.shape[1])
                rows.append(
                    (centred + direction * np.sqrt(energy / np.square(direction).sum())).astype(np.float32)
                )
            splits.append(tuple(rows))
        store = make_store(tmp_path / name / "tiny" / "layer_0.zarr", *splits, storage=storage)
        moments = store.manifest.splits["train"].inputs
        assert moments is not None
        assert np.square(moments.mean).sum() / np.sum(moments.second_moment) == pytest.approx(share, abs=1e-3)
        settings = make_settings(run=name)
        train(settings, store)
        heldout[name] = Transcoder.load(settings.run_dir()).metadata["heldout"]
    assert heldout["with"]["fvu"] == pytest.approx(heldout["without"]["fvu"], rel=0.01)


def test_a_loss_that_is_not_finite_stops_with_its_place(make_settings: Make, store: Store) -> None:
    settings = make_settings(train__lr=1e30, train__min_lr=0.0)
    with pytest.raises(InputError, match=r"loss is not finite at step \d+ \(prefix 0; rows from chunk \d of"):
        train(settings, store)


def test_a_run_without_a_checkpoint_is_begun_anew_with_other_settings(
    make_settings: Make, store: Store
) -> None:
    """As after "lower train.lr": nothing that was learned is there to be lost."""
    with pytest.raises(InputError, match=r"lower train\.lr"):
        train(make_settings(train__lr=1e30, train__min_lr=0.0), store)
    settings = make_settings()
    train(settings, store)
    assert Transcoder.load(settings.run_dir()).metadata["settings"]["train"]["lr"] == settings.train.lr
    with pytest.raises(InputError, match=r"train\.lr was 0\.003, asked auto"):
        train(make_settings(train__lr=None, train__min_lr=None), store)


def test_after_a_loss_that_is_not_finite_no_parameter_changes(make_settings: Make, store: Store) -> None:
    """Also where nobody looks at once: on a GPU the host looks only at logged steps."""
    settings, device = make_settings(), torch.device("cpu")
    recipe = Recipe.of(settings, store)
    state = State.start(initial(settings, recipe, store, device), recipe.objective.prefix_ends)
    step = step_for(recipe.objective, device)
    inputs, outputs = store.train.rows(0, 64)
    train_step(state, step, recipe, inputs, outputs)
    before = state.parameters.map(torch.clone)
    broken = outputs.clone()
    broken[3, 1] = torch.inf
    train_step(state, step, recipe, inputs, broken)
    train_step(state, step, recipe, inputs, outputs)
    assert state.failed.isnan().item()
    for name, tensor in state.parameters.named().items():
        torch.testing.assert_close(tensor, before.named()[name], msg=name)


def test_a_run_starts_with_more_active_latents_and_ends_with_k(finished: Path) -> None:
    l0 = {line["step"]: line["l0_norm"] for line in metrics(finished)}
    steps, k = max(l0), Transcoder.load(finished).metadata["settings"]["transcoder"]["k"]
    for step, active in l0.items():
        assert active == pytest.approx(active_latents(step - 1, steps, k, 10**6), rel=0.02)
    assert l0[steps] == pytest.approx(k, rel=0.02)
    assert l0[min(l0)] > 1.2 * k


def test_runs_trained_together_equal_runs_trained_alone(
    make_settings: Make, store: Store, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [make_settings(run="one"), make_settings(run="two", train__lr=1e-3, transcoder__k=6)]
    samples: list[Typical] = []
    monkeypatch.setattr(
        "train.recipe.typical_rows", lambda *of: samples.append(typical_rows(*of)) or samples[-1]
    )
    train_together(both, store)
    assert len(samples) == 1  # rows of the store, read once for all runs
    alone = make_settings(run="alone", train__lr=1e-3, transcoder__k=6)
    train(alone, store)
    assert_same_run(both[0].run_dir(), finished)
    assert_same_run(both[1].run_dir(), alone.run_dir())


def test_a_store_of_another_model_or_layer_is_refused(make_settings: Make, store: Store) -> None:
    other = make_settings()
    other = other.model_copy(update={"model": other.model.model_copy(update={"name": "other/tiny"})})
    with pytest.raises(InputError, match="model: there 'tests/tiny', asked 'other/tiny'"):
        train(other, store)
    with pytest.raises(InputError, match="layer: there 0, asked 3"):
        train(make_settings().model_copy(update={"layers": (3,)}), store)


def test_sizes_that_do_not_fit_the_stores_width_are_refused(make_settings: Make, store: Store) -> None:
    settings = make_settings(transcoder__d_sae="2.125x", transcoder__group_sizes=("2.125x",))
    with pytest.raises(InputError, match=r"transcoder: size 2.125x of d_in 12 is 25.5, not a whole"):
        train(settings, store)
