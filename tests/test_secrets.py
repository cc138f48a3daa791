"""HF_TOKEN, WANDB_API_KEY and passwords are neither written to a file nor printed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import evaluate.__main__
import harvest.__main__
import train.__main__
from common.cli import load, parser
from common.errors import InputError
from evaluate import export, read
from train import samples_page

SECRETS = {"HF_TOKEN": "hf_" + "q7Zp" * 9, "WANDB_API_KEY": "5ec4e7" * 7}
SAID = "said-in-the-settings"


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_no_file_and_no_line_holds_a_secret(
    surroundings: Path,
    llama: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Harvest, train with W&B, evaluate, export, read a text, samples, the real entry points."""
    shared = ["--layer", "1", "--run", "a", "--model.name", str(llama), "--model.device", "cpu"]
    shared += [
        "--paths.activations",
        str(surroundings / "stores"),
        "--paths.checkpoints",
        str(surroundings / "runs"),
    ]
    text = ["--data.files", str(corpus), "--data.pack", "concat", "--harvest.rows", "2000"]
    text += ["--harvest.context_length", "32", "--harvest.heldout_fraction", "0.1"]
    small = ["--transcoder.d_sae", "64", "--transcoder.group_sizes", "16,48", "--transcoder.k", "4"]
    small += ["--train.rows", "1920", "--train.batch_size", "64", "--train.sample_every", "5"]
    small += ["--train.checkpoint_every", "10", "--wandb.mode", "offline", "--wandb.project", SAID]
    for main, options in (
        (harvest.__main__.main, text),
        (train.__main__.main, small),
        (evaluate.__main__.main, ["--cross-entropy-tokens", "64"]),
        (export.main, ["--format", "saelens"]),
        (read.main, ["--text", "The capital of France"]),
        (samples_page.main, []),
    ):
        monkeypatch.setattr("sys.argv", ["x", *shared, *options])
        main()
    said = capfd.readouterr()
    files = {path: path.read_bytes() for path in surroundings.rglob("*") if path.is_file()}
    names = {path.name for path in files}
    assert {"settings.json", "zarr.json", "metrics.json", "cfg.json"} <= names
    assert {"report.html", "samples.html", "prompt.html"} <= names
    logged = [data for path, data in files.items() if path.suffix == ".wandb"]
    assert len(logged) == 2  # what training logged, and evaluation
    # It is not compressed: a secret would be seen as well.
    assert any(SAID.encode() in data for data in logged)
    for secret in SECRETS.values():
        assert [str(path) for path, data in files.items() if secret.encode() in data] == []
        assert secret not in said.out + said.err


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="written beside every artifact") as stopped:
        load(parser("train", ""), ["--layer", "1", "--paths.activations", "https://me:passw0rd@host/x"])
    assert "passw0rd" not in str(stopped.value)
    load(parser("train", ""), ["--layer", "1", "--paths.activations", "hf://datasets/me/name@main/x"])
