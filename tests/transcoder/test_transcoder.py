"""The transcoder as other stages use it, and its file."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from tests.train.steps import problem
from train.normalisation import Scaling, fold, unfold
from train.recipe import initialise
from transcoder import Transcoder


def tiny_transcoder(skip: bool = False) -> Transcoder:
    p = problem(skip=skip, dtype=torch.float32)
    return Transcoder(p.parameters, torch.tensor([0.1, 0.2, 0.3]), (2, 5, 11), {"harvest_fingerprint": "f"})


@pytest.mark.parametrize("skip", [False, True])
def test_folding_keeps_the_function_exact(skip: bool) -> None:
    """Powers of two as scales: folding is then exact in floating point, so equality is too."""
    p = problem(rows=20, skip=skip, dtype=torch.float32)
    by = Scaling(torch.zeros(5), torch.tensor([4.0, 8.0, 0.5, 1.0, 2.0]), 0.5)
    normal = Transcoder(p.parameters, torch.tensor([0.5]), (11,))
    raw = Transcoder(fold(p.parameters, by), torch.tensor([0.5]) * 0.5, (11,))
    inputs = p.x * by.scale_in
    assert torch.equal(by.inputs(inputs), p.x)
    assert torch.equal(raw(inputs), normal(p.x) * 0.5)
    assert torch.equal(raw.encode(inputs), normal.encode(p.x) * 0.5)
    assert torch.equal(raw.W_dec, normal.W_dec)
    back = unfold(raw.parameters, by)
    assert all(torch.equal(back.named()[n], t) for n, t in p.parameters.named().items())


@pytest.mark.parametrize("skip", [False, True])
def test_folding_takes_the_mean_and_any_scale_along(skip: bool) -> None:
    p = problem(rows=20, skip=skip)
    scale = torch.linspace(0.1, 3.7, 5, dtype=torch.float64)
    by = Scaling(torch.linspace(-3, 50, 5, dtype=torch.float64), scale, 0.31)
    raw_inputs = p.x * scale + by.mean_in
    normal = Transcoder(p.parameters, torch.tensor([0.0]), (11,))
    raw = Transcoder(fold(p.parameters, by), torch.tensor([0.0]), (11,))
    torch.testing.assert_close(raw(raw_inputs), normal(by.inputs(raw_inputs)) * 0.31, rtol=1e-12, atol=1e-12)
    back = unfold(raw.parameters, by)
    for name, tensor in p.parameters.named().items():
        torch.testing.assert_close(back.named()[name], tensor, rtol=1e-12, atol=1e-12)


def test_encode_keeps_what_is_above_the_threshold() -> None:
    t, x = tiny_transcoder(), problem(rows=20, dtype=torch.float32).x
    pre, acts = t.pre_activations(x), t.encode(x)
    assert torch.equal(acts, torch.where(pre > t.threshold, pre, 0.0))
    assert 0 < int((acts > 0).sum()) < acts.numel()


@pytest.mark.parametrize("skip", [False, True])
def test_call_is_decode_of_encode_plus_skip(skip: bool) -> None:
    t, x = tiny_transcoder(skip), problem(rows=20, dtype=torch.float32).x
    expected = t.encode(x) @ t.W_dec + t.b_dec + (x @ t.W_skip.T if skip else 0)
    torch.testing.assert_close(t(x), expected)
    assert t(x[:0]).shape == (0, 3)


def test_a_prefix_is_a_complete_transcoder() -> None:
    t, x = tiny_transcoder(), problem(rows=20, dtype=torch.float32).x
    narrow = t.prefix(1)
    assert (narrow.d_sae, narrow.prefix_ends, narrow.threshold) == (5, (2, 5), pytest.approx(0.2))
    pre = t.pre_activations(x)[:, :5]
    torch.testing.assert_close(narrow(x), (pre * (pre > narrow.threshold)) @ t.W_dec[:5] + t.b_dec)
    assert t.prefix(-1).d_sae == 11


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, skip: bool) -> None:
    t = tiny_transcoder(skip)
    t.save(tmp_path)
    for path in (tmp_path, tmp_path / "transcoder.safetensors"):
        again = Transcoder.load(path)
        named = again.parameters.named()
        assert all(torch.equal(named[name], tensor) for name, tensor in t.parameters.named().items())
        assert torch.equal(again.thresholds, t.thresholds)
        assert (again.prefix_ends, again.metadata) == (t.prefix_ends, t.metadata)
    assert [file.name for file in tmp_path.iterdir()] == ["transcoder.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_enc": None}, r"tensor b_enc: expected shape \[11\], found none"),
        ({"W_dec": torch.zeros(11, 4)}, r"tensor W_dec: expected float32 \[11, 3\], found float32 \[11, 4\]"),
        ({"W_enc": torch.zeros(11, 5).half()}, r"expected float32 \[11, 5\], found float16 \[11, 5\]"),
        ({"extra": torch.zeros(1)}, "unknown tensor extra"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "transcoder.safetensors"
    tiny_transcoder().save(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: t for name, t in (load_file(file) | change).items() if t is not None}
    save_file(tensors, file, metadata)
    with pytest.raises(InputError, match=message) as caught:
        Transcoder.load(file)
    assert str(file) in str(caught.value)


def test_what_is_no_transcoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no transcoder here"):
        Transcoder.load(tmp_path)
    file = tmp_path / "transcoder.safetensors"
    file.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        Transcoder.load(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(
        InputError, match="version 1, found none: another tool's file \\(a\\); this project reads its"
    ):
        Transcoder.load(file)


def test_initial_values_have_the_right_mean_norm_and_spread() -> None:
    mean = torch.tensor([1.0, -2.0, 3.0])
    first = initialise(400, 50, mean, skip=True, seed=1)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(50))
    assert torch.equal(first.b_dec, mean)
    assert float(first.W_enc.std()) == pytest.approx(0.1 / 20, rel=0.02)
    assert not first.b_enc.any()
    assert not first.W_skip.any()
    again, other = (initialise(400, 50, mean, skip=True, seed=seed) for seed in (1, 2))
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (20, 5), (4, 5, 5), (2, 2, 5, 5), (0, 5), (3, 0, 5)])
def test_any_leading_shape_and_floating_dtype(shape: tuple[int, ...], dtype: torch.dtype, skip: bool) -> None:
    """As activations come out of a model's cache: the same rows one by one, in float32."""
    t = tiny_transcoder(skip)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = x.reshape(-1, 5).float()
    acts, outputs = t.encode(x), t(x)
    assert (acts.shape, outputs.shape) == ((*shape[:-1], 11), (*shape[:-1], 3))
    assert acts.dtype == outputs.dtype == torch.float32
    assert torch.equal(acts.reshape(-1, 11), t.encode(rows))
    assert torch.equal(outputs.reshape(-1, 3), t(rows))
    assert torch.equal(t.pre_activations(x).reshape(-1, 11), t.pre_activations(rows))
    assert torch.equal(t.base_output(x).reshape(-1, 3), t.base_output(rows))
    narrowed = acts.to(dtype)
    assert torch.equal(t.decode(narrowed).reshape(-1, 3), t.decode(narrowed.reshape(-1, 11).float()))
    assert t.prefix(0)(x).shape == (*shape[:-1], 3)


def test_views_that_are_not_contiguous_and_a_gradient() -> None:
    t = tiny_transcoder(skip=True)
    x = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0).requires_grad_()
    t(x).sum().backward()
    t.encode(x[:, ::2]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(t.encode(x.bfloat16()[:, ::2]), t.encode(x.bfloat16())[:, ::2])


@pytest.mark.parametrize("call", [Transcoder.encode, Transcoder.__call__, Transcoder.pre_activations])
def test_what_is_no_input_is_refused(call) -> None:
    with pytest.raises(InputError, match=r"inputs: expected floats \[\.\.\., 5\], found float32 \[4, 3\]"):
        call(tiny_transcoder(), torch.zeros(4, 3))
    with pytest.raises(InputError, match=r"acts: expected floats \[\.\.\., 11\], found float32 \[4, 5\]"):
        tiny_transcoder().decode(torch.zeros(4, 5))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_says_who_reads_the_weights(umask: int, tmp_path: Path) -> None:
    """safetensors makes files of mode 0600, which a colleague, a web server or a container's user cannot read."""
    old = os.umask(umask)
    try:
        tiny_transcoder().save(tmp_path / "run")
        tiny_transcoder().save(tmp_path / "run")  # over a file that is there
    finally:
        os.umask(old)
    files = list((tmp_path / "run").iterdir())
    assert [file.name for file in files] == ["transcoder.safetensors"]
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o666 & ~umask
