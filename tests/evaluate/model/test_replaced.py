"""All MLPs replaced at once, against Hugging Face's own hooks, against splice(), and in closed form."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate.metrics.splice import Loss, splice
from evaluate.model.layer_set import LayerSet
from evaluate.model.replaced import CLEAN, MEAN, ZERO, Measured, Mlps, measure, passes, with_error
from shards.layout import kept_mask
from shards.manifest import Source
from tests.evaluate.fakes import random_coder
from tests.evaluate.metrics.test_splice import contexts, hugging_face, language_model, own_contexts
from tests.fixtures import make_source
from tests.models import parts_of, save_model
from transcoder import Transcoder
from transcoder.transcoder import Parameters

ENDS = (4, 9)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights ten times the usual size, so that the MLPs matter to the loss."""
    return save_model(tmp_path_factory.mktemp("loud") / request.param, request.param, initializer_range=0.2)


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose MLPs are transcoders: one layer of ReLU."""
    folder = tmp_path_factory.mktemp("relu") / "gpt2"
    return save_model(folder, "gpt2", activation_function="relu", initializer_range=0.2)


def source_of(layer: int, **changes: object) -> Source:
    hooks = {"input_hook": f"blocks.{layer}.mlp.hook_in", "output_hook": f"blocks.{layer}.hook_mlp_out"}
    tokens = {"bos_token_id": 0, "dropped_token_ids": [0, 1, 2]}
    return make_source(
        32, 32, 100, **{"layer": layer, "n_layers": 3, "input": "mlp_in", **hooks, **tokens, **changes}
    )


def set_of(coders: Mapping[int, Transcoder], **changes: object) -> LayerSet:
    """A layer set without stores on disk: their manifests' sources are all that is measured with."""
    stores: dict[int, Any] = {
        layer: SimpleNamespace(manifest=SimpleNamespace(source=source_of(layer, **changes)))
        for layer in coders
    }
    return LayerSet("tiny", stores, coders)


def random_set(layers: tuple[int, ...] = (0, 1, 2)) -> LayerSet:
    return set_of({layer: random_coder(32, 32, ENDS, seed=layer, layer=layer) for layer in layers})


MEANS = {layer: torch.linspace(-1, 1, 32) * (layer + 1) for layer in range(3)}


def measured(directory: Path, layer_set: LayerSet, ids: np.ndarray, n_part: int) -> Measured:
    """And every pass was counted."""
    model, ticks = language_model(directory), []
    means = {layer: MEANS[layer] for layer in layer_set.layers}
    found = measure(model, layer_set, means, ids, n_part, ticks.append)
    expected = passes(model, layer_set, len(ids), n_part, ids.shape[1])
    assert sum(ticks) == pytest.approx(expected, abs=len(ticks))  # each is rounded
    return found


def test_the_models_own_losses_are_taken_over_if_they_are_still_its_own(relu: Path) -> None:
    """As it is, zeroed and at the mean: two passes fewer for every batch. Other losses are measured again."""
    model, layer_set, ids = language_model(relu), random_set((0, 1)), contexts()
    means, ticks = {layer: MEANS[layer] for layer in layer_set.layers}, []
    first = measure(model, layer_set, means, ids, 2, lambda _: None)
    second = measure(model, layer_set, means, ids, 2, ticks.append, first.whole)
    assert sum(ticks) == pytest.approx(passes(model, layer_set, len(ids), 2, ids.shape[1], kept=True), abs=9)
    assert [nats(second.whole[name]) for name in second.whole] == [
        nats(first.whole[name]) for name in second.whole
    ]
    assert second.whole[ZERO] is first.whole[ZERO]
    other = {name: Loss(contexts=[each + 1 for each in loss.contexts]) for name, loss in first.whole.items()}
    again = measure(model, layer_set, means, ids, 2, lambda _: None, other)
    assert nats(again.whole[ZERO]) == nats(first.whole[ZERO])


def nats(loss: Loss) -> tuple[float, float]:
    return loss.cross_entropy / loss.positions, loss.divergence / loss.positions


def by_hugging_face(
    directory: Path, ids: np.ndarray, functions: Mapping[int, Any]
) -> tuple[float, float, float]:
    """(cross-entropy, KL, agreement) of plain Hugging Face with functions of the MLPs' inputs in their places."""
    labels = torch.from_numpy(ids.astype(np.int64))
    kept = torch.from_numpy(kept_mask(ids, [0, 1, 2]))
    model, caught = hugging_face(directory), {}

    def put(layer: int) -> None:
        parts = parts_of(model, layer)
        parts.mlp.register_forward_pre_hook(lambda module, args: caught.__setitem__(layer, args[0]))

        def write(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = output.clone()
            output[kept] = functions[layer](caught[layer][kept])
            return output

        parts.added.register_forward_hook(write)

    with torch.inference_mode():
        clean = model(labels).logits.double().log_softmax(-1)[:, :-1]
        for layer in functions:
            put(layer)
        result = model(labels, labels=labels)
        changed = result.logits.double().log_softmax(-1)[:, :-1]
    divergence = (clean.exp() * (clean - changed)).sum(-1).mean()
    agreement = (clean.argmax(-1) == changed.argmax(-1)).double().mean()
    return float(result.loss), float(divergence), float(agreement)


def test_every_figure_is_what_hugging_face_hooks_give(directory: Path) -> None:
    """Of whole and cumulative replacement, both ablations, every prefix; contexts of both kinds."""
    ids, layer_set = contexts(), random_set()
    found = measured(directory, layer_set, ids, n_part=3)
    for g in range(len(ENDS)):
        coders = {layer: coder.prefix(g) for layer, coder in layer_set.coders.items()}
        _same(found.whole[str(g)], by_hugging_face(directory, ids, coders))
        for layer in range(3):
            below = {each: coders[each] for each in range(layer + 1)}
            _same(found.cumulative[g, layer], by_hugging_face(directory, ids[:3], below))
    constants: dict[str, dict[int, Tensor]] = {ZERO: dict.fromkeys(range(3), torch.zeros(32)), MEAN: MEANS}
    for name, values in constants.items():
        functions = {
            layer: (lambda rows, v=value: v.expand(len(rows), -1)) for layer, value in values.items()
        }
        _same(found.whole[name], by_hugging_face(directory, ids, functions))
    _same(found.whole[CLEAN], by_hugging_face(directory, ids, {}))
    _same(found.part_clean, by_hugging_face(directory, ids[:3], {}))


def _same(loss: Loss, expected: tuple[float, float, float]) -> None:
    assert nats(loss) == pytest.approx(expected[:2], rel=1e-4, abs=1e-5)
    assert loss.agreed / loss.positions == pytest.approx(expected[2])


def test_with_error_terms_it_is_the_model_to_the_last_bit(directory: Path) -> None:
    """A rounding error would move latents across their thresholds: y + (R(x) - R(x0)) has none."""
    found = measured(directory, random_set(), contexts(), n_part=5)
    assert found.largest_difference == {0: 0.0, 1: 0.0}
    for g in range(len(ENDS)):
        assert found.with_errors[g] == found.part_clean
        assert nats(found.whole[str(g)])[1] > 0.01


def test_an_error_term_is_a_constant_and_the_transcoder_still_reads_its_input() -> None:
    coder = random_coder(32, 32, ENDS)
    clean, changed, outputs = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    torch.testing.assert_close(
        with_error(coder, clean, outputs)(changed), coder(changed) + (outputs - coder(clean))
    )
    assert torch.equal(with_error(coder, clean, outputs)(clean), outputs)


def test_one_layer_alone_is_splice(directory: Path) -> None:
    ids, layer = own_contexts(directory), 1
    layer_set = random_set((layer,))
    found = measured(directory, layer_set, ids, n_part=10)
    coders = {str(g): layer_set.coders[layer].prefix(g) for g in range(len(ENDS))}
    floors = {ZERO: torch.zeros_like, MEAN: lambda rows: MEANS[layer].expand(len(rows), -1)}
    spliced = splice(language_model(directory), source_of(layer), ids, floors | coders, lambda _: None)
    for name, loss in spliced.items():
        assert found.whole[name].positions == loss.positions
        assert nats(found.whole[name]) == pytest.approx(nats(loss), rel=1e-5, abs=1e-6)
        assert found.whole[name].agreed == loss.agreed
    assert spliced[CLEAN].agreed == spliced[CLEAN].positions
    assert {layer for _, layer in found.cumulative} == {layer}


def test_up_to_the_last_layer_is_all_of_them(directory: Path) -> None:
    """Of a set that lacks a layer too: layers 0 and 2."""
    ids = contexts()
    for layers in ((0, 1, 2), (0, 2), (1,)):
        found = measured(directory, random_set(layers), ids, n_part=len(ids))
        assert found.part_clean == found.whole[CLEAN]
        for g in range(len(ENDS)):
            assert found.cumulative[g, layers[-1]] == found.whole[str(g)]
            assert [layer for prefix, layer in sorted(found.cumulative) if prefix == g] == list(layers)


def test_transcoders_of_the_mean_are_mean_ablation(directory: Path) -> None:
    silent = random_coder(32, 32, ENDS)
    coders = {
        layer: replace(
            silent,
            parameters=replace(silent.parameters, b_dec=MEANS[layer]),
            thresholds=torch.full((len(ENDS),), torch.inf),
        )
        for layer in range(3)
    }
    found = measured(directory, set_of(coders), contexts(), n_part=1)
    assert found.whole["0"] == found.whole["1"] == found.whole[MEAN]
    assert found.whole[MEAN] != found.whole[ZERO]


def test_exact_transcoders_cost_nothing(relu: Path) -> None:
    """A ReLU MLP is a transcoder; its first half as prefix 0 is not."""
    coders = {}
    for layer in range(3):
        mlp: Any = parts_of(hugging_face(relu), layer).mlp
        (inner, b_inner), (outer, b_outer) = (
            (each.weight.detach(), each.bias.detach()) for each in (mlp.c_fc, mlp.c_proj)
        )
        n = len(b_inner)
        own = Parameters(inner.T.contiguous(), b_inner, outer, b_outer)
        coders[layer] = Transcoder(own, torch.zeros(2), (n // 2, n), {"source": {"input": "mlp_in"}})
    found = measured(relu, set_of(coders), own_contexts(relu), n_part=9)
    assert nats(found.whole["1"]) == pytest.approx((nats(found.whole[CLEAN])[0], 0.0), abs=1e-5)
    assert found.whole["1"].agreed == found.whole["1"].positions
    assert nats(found.whole["0"])[1] > 0.01
    assert nats(found.cumulative[1, 0]) == pytest.approx((nats(found.part_clean)[0], 0.0), abs=1e-5)


def test_positions_without_a_row_keep_their_own_output(directory: Path) -> None:
    """By each layer's own store: two may have dropped different tokens."""
    ids = contexts()
    seen: dict[int, int] = {0: 0, 2: 0}

    def counting(layer: int) -> Any:
        def zero(rows: Tensor) -> Tensor:
            seen[layer] += len(rows)
            return torch.zeros_like(rows)

        return zero

    sources = {0: source_of(0), 2: source_of(2, dropped_token_ids=[])}
    mlps = Mlps(language_model(directory), sources, ids)
    with torch.inference_mode():
        mlps.replaced({layer: counting(layer) for layer in sources})
    assert seen == {0: ids.size - len(ids) - 1, 2: ids.size - len(ids)}
