"""Splicing against Hugging Face's own loss and forward hooks, for every family of tests/models.py."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.settings import Model, Settings
from evaluate.labels.effects import logit_effects
from evaluate.metrics.language import measure_language
from evaluate.metrics.splice import Loss, splice, standard_error, summary
from evaluate.records import AblationLosses
from harvest import lm
from harvest.run import harvest
from shards import Store
from shards.layout import kept_mask
from shards.manifest import Source
from tests.evaluate.fakes import random_coder
from tests.fixtures import make_source
from tests.models import FAMILIES, parts_of, save_model


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights ten times the usual size, so that the MLP matters to the loss."""
    return save_model(tmp_path_factory.mktemp("loud") / request.param, request.param, initializer_range=0.2)


def language_model(directory: Path) -> lm.LanguageModel:
    model = Model(name=str(directory), device="cpu", dtype="float32")
    return lm.load(model, lm.locate(model), lm.load_tokenizer(str(directory), None))


def hugging_face(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def contexts(n: int = 7, length: int = 12) -> np.ndarray:
    ids = np.random.default_rng(0).integers(3, 300, (n, length)).astype(np.int32)
    ids[:, 0] = 0
    ids[2, length // 2] = 1
    return ids


def own_contexts(directory: Path) -> np.ndarray:
    """Contexts drawn from the model itself, on which any change of it costs cross-entropy."""
    model, ids = hugging_face(directory), torch.from_numpy(contexts(80, length=2).astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(10):
            p = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, p.multinomial(1, generator=generator)], dim=1)
    return ids.numpy().astype(np.int32)


def source_of(layer: int) -> Source:
    hooks = {
        "input_hook": f"blocks.{layer}.ln2.hook_normalized",
        "output_hook": f"blocks.{layer}.hook_mlp_out",
    }
    return make_source(
        32, 32, 100, layer=layer, n_layers=3, bos_token_id=0, dropped_token_ids=[0, 1, 2], **hooks
    )


def own_mlp(directory: Path, model: lm.LanguageModel, layer: int) -> Callable[[Tensor], Tensor]:
    """The perfect transcoder: gain and bias, MLP and post-norm of the block, applied to normalised inputs."""
    _, mlp, added = parts_of(hugging_face(directory), layer)
    after = torch.nn.Identity() if added is mlp else added
    gain = model.gain(layer)
    bias = 0 if gain.bias is None else gain.bias
    return lambda inputs: after(mlp(inputs * gain.values + bias))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_clean_loss_is_hugging_faces_and_the_mlp_itself_costs_nothing(layer: int, directory: Path) -> None:
    model = language_model(directory)
    ids = own_contexts(directory)
    seen: list[int] = []
    losses = splice(
        model,
        source_of(layer),
        ids,
        {"zero": torch.zeros_like, "mean": torch.zeros_like, "mlp": own_mlp(directory, model, layer)},
        seen.append,
    )
    labels = torch.from_numpy(ids.astype(np.int64))
    with torch.inference_mode():
        expected = float(hugging_face(directory)(labels, labels=labels).loss)
    assert sum(seen) == ids.size
    assert losses["clean"].positions == ids.shape[0] * (ids.shape[1] - 1)
    assert summary(losses, "clean").cross_entropy == pytest.approx(expected, abs=1e-4)
    assert losses["clean"].divergence == pytest.approx(0.0, abs=1e-6)
    perfect = summary(losses, "mlp")
    assert perfect.cross_entropy == pytest.approx(expected, abs=1e-4)
    assert perfect.recovered_zero == pytest.approx(1.0, abs=1e-3)
    assert perfect.kl == pytest.approx(0.0, abs=1e-5)
    assert summary(losses, "zero").kl > 1e-4


def test_a_replacement_is_what_a_hugging_face_hook_would_do(directory: Path) -> None:
    ids, layer = contexts(), 1
    labels = torch.from_numpy(ids.astype(np.int64))
    constant = torch.linspace(-1, 1, 32)
    losses = splice(
        language_model(directory),
        source_of(layer),
        ids,
        {"constant": lambda x: constant.expand(len(x), -1)},
        lambda _: None,
    )
    reference = hugging_face(directory)
    last = parts_of(reference, layer).added
    kept = torch.from_numpy(kept_mask(ids, source_of(layer).dropped_token_ids))

    def write(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[kept] = constant
        return output

    with torch.inference_mode():
        clean = reference(labels).logits.double().log_softmax(-1)[:, :-1]
        last.register_forward_hook(write)
        result = reference(labels, labels=labels)
    spliced = result.logits.double().log_softmax(-1)[:, :-1]
    kl = (clean.exp() * (clean - spliced)).sum(-1).mean()
    assert losses["constant"].cross_entropy / losses["constant"].positions == pytest.approx(
        float(result.loss), abs=1e-4
    )
    assert losses["constant"].divergence / losses["constant"].positions == pytest.approx(float(kl), rel=1e-3)


def test_recovered_shares_by_hand() -> None:
    nats = {"clean": 3.0, "zero": 5.0, "mean": 4.0, "0": 3.5, "1": 3.0}
    losses = {name: Loss(10, 10 * ce, 2.0) for name, ce in nats.items()}
    assert summary(losses, "0").written() == {
        "cross_entropy": 3.5,
        "increase": 0.5,
        "increase_error": None,
        "kl": 0.2,
        "recovered_zero": 0.75,
        "recovered_mean": 0.5,
    }
    assert summary(losses, "1").recovered_zero == 1.0
    assert summary(losses, "zero").recovered_zero == 0.0
    losses["zero"] = Loss(10, 30.0)  # an MLP that does nothing cannot be recovered
    assert summary(losses, "0").recovered_zero is None


def test_the_standard_error_is_of_the_contexts_by_hand() -> None:
    """Three contexts that lose 0.1, 0.2 and 0.6 nats: mean 0.3, standard deviation sqrt(0.07), over the root of 3."""
    losses = {"clean": Loss(), "zero": Loss(), "mean": Loss(), "0": Loss()}
    for loss in (0.1, 0.2, 0.6):
        own = np.array([1.0, 2.0, 3.0], np.float32)
        for name in losses:
            losses[name].add_context(own)
        losses["0"].contexts[-1] = own + np.array([0, 1, 2], np.float32) * np.float32(loss)
    losses["0"].cross_entropy += 3 * (0.1 + 0.2 + 0.6)
    measured = summary(losses, "0")
    assert measured.increase == pytest.approx(0.3)
    assert measured.increase_error == pytest.approx((0.07 / 3) ** 0.5, rel=1e-6)
    assert summary(losses, "zero").increase_error == 0.0
    assert standard_error(np.array([0.5])) is None


def test_positions_without_a_row_are_left_alone(directory: Path) -> None:
    """Of a model without BOS too, whose contexts begin with a token like any other."""
    ids = contexts()
    ids[:, 0] = 9
    seen: list[int] = []

    def count(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return torch.zeros_like(inputs)

    source = source_of(1).model_copy(update={"bos_token_id": None})
    splice(language_model(directory), source, ids, {"zero": count}, lambda _: None)
    assert sum(seen) == ids.size - len(ids) - 1


@pytest.fixture
def harvested(llama: Path, settings_for: Callable[..., Settings]) -> tuple[Settings, Store]:
    settings = settings_for(llama)
    harvest(settings)
    return settings, Store.open(settings.store_path(settings.layer))


def test_every_prefix_of_a_run_on_its_own_store(harvested: tuple[Settings, Store]) -> None:
    settings, store = harvested
    coder = random_coder(32, 32, ends=(4, 9))
    language = measure_language(settings, store, store.heldout, coder, 64)
    measured = language.cross_entropy
    assert isinstance(measured, AblationLosses)
    assert language.effects.promoted.shape == language.effects.suppressed_by.shape == (9, 10)
    assert measured.positions == measured.contexts * (store.manifest.source.context_length - 1)
    assert len(language.prefixes) == 2
    assert all(prefix.kl > 0 for prefix in language.prefixes)


def test_another_or_missing_model_is_skipped_with_a_reason(
    harvested: tuple[Settings, Store], gemma: Path, tmp_path: Path
) -> None:
    settings, store = harvested
    coder = random_coder(32, 32, ends=(4,))
    for name, reason in ((str(gemma), "expected weights"), (str(tmp_path / "absent"), "no such directory")):
        model = settings.model.model_copy(update={"name": name})
        other = settings.model_copy(update={"model": model})
        measured = measure_language(other, store, store.heldout, coder, 64)
        assert measured.cross_entropy.skipped
        assert reason in measured.cross_entropy.skipped
        assert measured.prefixes == []
        assert measured.effects.promoted.shape == (4, 0)
    unasked = measure_language(settings, store, store.heldout, coder, 0)
    assert unasked.cross_entropy.written() == {"skipped": "it was not asked for"}


def test_promoted_and_suppressed_tokens_are_hugging_faces_logits(directory: Path) -> None:
    """Of the decoder row alone, less the vocabulary's mean: what the final norm's bias and the head's add is the same
    for all latents. Of each token the value is compared; the order is that of their z (test_effects).
    """
    W_dec = random_coder(3, 32, ends=(300,)).W_dec
    effects = logit_effects(language_model(directory), W_dec, n=4)
    reference = hugging_face(directory)
    norm = reference.transformer.ln_f if hasattr(reference, "transformer") else reference.model.norm
    with torch.inference_mode():
        if isinstance(norm, torch.nn.LayerNorm):
            norm.bias.zero_()
        logits = reference.lm_head(norm(W_dec))
        logits -= logits.mean(1, keepdim=True)
    for tokens, values in (
        (effects.promoted, effects.promoted_by),
        (effects.suppressed, effects.suppressed_by),
    ):
        expected = logits.gather(1, torch.from_numpy(tokens).long())
        torch.testing.assert_close(torch.from_numpy(values), expected, rtol=1e-4, atol=1e-4)
    assert (effects.promoted_by > 0).all()
    assert (effects.suppressed_by < 0).all()
