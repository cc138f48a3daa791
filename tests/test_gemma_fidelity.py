"""A Gemma-2, tiny and at its real width: what we harvest is what Gemma Scope's transcoders read and predict.

Their inputs are ln2.hook_normalized, without the norm's gain 1 + w, their targets hook_mlp_out, after the post-norm.
Both are computed here from the modules of Hugging Face alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.errors import InputError
from common.settings import Settings
from evaluate.subject import read
from harvest.run import harvest
from shards import Store
from tests.evaluate.fakes import random_coder
from tests.models import save_model, save_wide_gemma, sentences, write_jsonl
from train import loop
from transcoder import Transcoder
from transcoder.export import export
from transcoder.formats import gemma_scope
from transcoder.gain import convert

WHOLE, WITH_ZERO = 0, 1
"""Layers: all gains differ from zero; one gain is exactly zero, as in the real Gemma-2."""
CONVENTIONS = ("normalized", "mlp_in")


class Harvested(NamedTuple):
    model: Path
    zero: int
    """Dimension whose gain is zero in layer WITH_ZERO."""
    settings: Callable[..., Settings]

    def store(self, convention: str, layer: int = WHOLE) -> Store:
        return Store.of(self.settings(convention, layer))


@pytest.fixture(scope="module", params=["tiny", pytest.param("real width", marks=pytest.mark.slow)])
def harvested(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Harvested:
    """Both layers of a model with one zero gain, harvested with and without the gain."""
    root = tmp_path_factory.mktemp("gemma")
    folder = (
        save_model(root / "made", "gemma2") if request.param == "tiny" else save_wide_gemma(root / "made")
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    zero = model.config.hidden_size // 2 + 1
    with torch.no_grad():
        for layer in model.model.layers:  # random bfloat16 gains hit zero by chance too, at 1 of 2304
            weight = layer.pre_feedforward_layernorm.weight
            weight[weight == -1.0] = 0.5
        model.model.layers[WITH_ZERO].pre_feedforward_layernorm.weight[zero] = -1.0
    model.save_pretrained(folder)
    corpus = write_jsonl(root / "corpus.jsonl", sentences(200))

    def settings(convention: str, layer: int = WHOLE) -> Settings:
        sections = {
            "model": {"name": str(folder), "device": "cpu"},
            "data": {"files": (str(corpus),), "pack": "concat"},
            "harvest": {"rows": 1100, "context_length": 32, "heldout_fraction": 0.1, "input": convention}
            | {"storage": "float32"},
            "transcoder": {"d_sae": 64, "group_sizes": (16, 48), "k": 4},
            "train": {"rows": 64 * 30, "batch_size": 64, "lr": 2e-3, "min_lr": 2e-5, "warmup_steps": 5},
            "wandb": {"mode": "disabled"},
            "paths": {"activations": str(root / "activations"), "checkpoints": str(root / "checkpoints")},
        }
        top = {"layers": (layer,), "run": convention, "harvest_name": convention}
        return Settings.model_validate(sections | top)

    for convention in CONVENTIONS:
        harvest(settings(convention).model_copy(update={"layers": (WHOLE, WITH_ZERO)}))
    return Harvested(folder, zero, settings)


def by_modules(model: Path, layer: int, contexts: Tensor) -> dict[str, Tensor]:
    """[contexts, T, D] of the block: normalized and mlp_in inputs, and what is added to the residual."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    block, caught = loaded.model.layers[layer], {}
    norm = block.pre_feedforward_layernorm
    norm.register_forward_pre_hook(lambda module, args: caught.__setitem__("residual", args[0]))
    norm.register_forward_hook(lambda module, args, out: caught.__setitem__("mlp_in", out))
    after = block.post_feedforward_layernorm
    after.register_forward_hook(lambda module, args, out: caught.__setitem__("added", out))
    with torch.inference_mode():
        loaded(contexts)
    residual = caught.pop("residual")
    caught["normalized"] = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + norm.eps)
    return caught


@pytest.mark.parametrize("layer", [WHOLE, WITH_ZERO])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rows_are_what_gemma_scope_reads_and_predicts(
    harvested: Harvested, convention: str, layer: int
) -> None:
    store = harvested.store(convention, layer)
    inputs, outputs = store.train.rows(0, len(store.train))
    context, position = (values.astype(np.int64) for values in store.train.provenance(0, len(store.train)))
    tokens = torch.from_numpy(store.train.contexts[np.arange(len(store.train.contexts))].astype(np.int64))
    expected = by_modules(harvested.model, layer, tokens)
    torch.testing.assert_close(inputs, expected[convention][context, position], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs, expected["added"][context, position], rtol=1e-4, atol=1e-4)
    gain = torch.tensor(store.manifest.source.gain)
    assert int((gain == 0).sum()) == (layer == WITH_ZERO)
    torch.testing.assert_close(expected["normalized"] * gain, expected["mlp_in"], rtol=1e-4, atol=1e-4)


def params(harvested: Harvested, folder: Path, blind: bool = False) -> Path:
    """A JumpReLU transcoder of the model's width in Gemma Scope's format; `blind` to the zero dimension."""
    width = harvested.store("normalized").manifest.source.d_in
    coder = random_coder(width, width, (96,), per_latent=True)
    if blind:
        coder.W_enc[:, harvested.zero] = 0
    return gemma_scope.write(folder, *coder.saved())


def test_their_transcoder_says_the_same_on_stores_of_both_conventions(
    harvested: Harvested, tmp_path: Path
) -> None:
    folder = params(harvested, tmp_path)
    said = []
    for convention in CONVENTIONS:
        store = harvested.store(convention)
        said.append(read(folder, store)(store.heldout.rows(0, 50)[0]))
    torch.testing.assert_close(*said, rtol=1e-3, atol=1e-3)
    plain = Transcoder.load(folder)
    assert torch.equal(said[0], plain(harvested.store("normalized").heldout.rows(0, 50)[0]))


def test_a_zero_gain_is_refused_by_its_dimension(harvested: Harvested, tmp_path: Path) -> None:
    store = harvested.store("mlp_in", WITH_ZERO)
    with pytest.raises(InputError, match=rf"the gain of dimension {harvested.zero} is zero"):
        read(params(harvested, tmp_path), store, mismatch=True)
    folder = params(harvested, tmp_path / "blind", blind=True)
    outputs = read(folder, store, mismatch=True)(store.heldout.rows(0, 50)[0])
    other = harvested.store("normalized", WITH_ZERO)
    torch.testing.assert_close(
        outputs, read(folder, other, mismatch=True)(other.heldout.rows(0, 50)[0]), rtol=1e-3, atol=1e-3
    )


def test_trained_with_the_gain_and_converted_it_is_the_same_function(harvested: Harvested) -> None:
    """And back again where no gain is zero, but not where one is."""
    for layer in (WHOLE, WITH_ZERO):
        settings = harvested.settings("mlp_in", layer)
        own = loop.train(settings, Store.of(settings))
        with_gain, _ = Store.of(settings).heldout.rows(0, 50)
        without, _ = harvested.store("normalized", layer).heldout.rows(0, 50)
        exported = Transcoder.load(export(settings.run_dir(), "gemma_scope"))
        torch.testing.assert_close(exported(without), own(with_gain), rtol=1e-3, atol=1e-3)
        assert not torch.allclose(own(without), own(with_gain), rtol=1e-3, atol=1e-3)
        norm = own.metadata["source"]
        if layer == WHOLE:
            back = convert(exported, "mlp_in", norm, "exported")
            torch.testing.assert_close(back(with_gain), own(with_gain), rtol=1e-3, atol=1e-3)
    converted = convert(own, "normalized", norm, "own")
    assert not converted.W_enc[:, harvested.zero].any()  # what was lost is what was never there
    settings = harvested.settings("normalized", WITH_ZERO)
    plain = loop.train(settings, Store.of(settings))
    with pytest.raises(InputError, match=rf"the gain of dimension {harvested.zero} is zero"):
        convert(plain, "mlp_in", norm, "trained without")
