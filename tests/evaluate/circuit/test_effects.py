"""Direct effects against ablation in the frozen model, against the model's own parts, and what they must sum to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.errors import InputError
from evaluate.circuit import attribute, frozen
from evaluate.circuit.attribute import Effects, Text
from evaluate.circuit.graph import ERROR, LATENT, LOGIT, TOKEN
from tests.evaluate.circuit.small import TOKENS, coders_of, effects_of, load, text
from tests.models import save_model


def every_target(effects: Effects) -> np.ndarray:
    return np.flatnonzero(np.isin(effects.nodes.kind, (LATENT, LOGIT)))


def without(effects: Effects, source: int) -> tuple[Tensor, list[Tensor]]:
    """Embeddings and MLP outputs of the model as it is, less what one source contributes."""
    nodes, frozen = effects.nodes, effects.frozen
    embedding, written = frozen.embedding.clone(), [each.clone() for each in frozen.written]
    kind, layer, position = (int(each[source]) for each in (nodes.kind, nodes.layer, nodes.position))
    if kind == TOKEN:
        embedding[position] = 0
    elif kind == ERROR:
        written[layer][position] -= effects.errors[layer][position]
    else:
        row = effects.coders[layer].W_dec[nodes.number[source]]
        written[layer][position] -= float(nodes.value[source]) * row
    return embedding, written


def reached(effects: Effects, embedding: Tensor, written: list[Tensor]) -> np.ndarray:
    """What every target has when these are written: latents' pre-activations, then logits less their mean."""
    nodes, model = effects.nodes, effects.model
    with torch.no_grad():
        reads = effects.frozen.run(embedding, written)
        pre = [coder.pre_activations(x) for coder, x in zip(effects.coders, reads.inputs, strict=True)]
        logits = model.bridge.original_model.get_output_embeddings()(reads.final[-1])
    values = [
        pre[nodes.layer[t]][nodes.position[t], nodes.number[t]]
        if nodes.kind[t] == LATENT
        else logits[nodes.number[t]] - logits.mean()
        for t in every_target(effects)
    ]
    return torch.stack(values).numpy()


@pytest.mark.parametrize("skip", [False, True])
def test_an_effect_is_what_taking_its_source_away_changes(model_directory: Path, skip: bool) -> None:
    """Every kind of source in every layer, on every latent and logit: the frozen model is linear."""
    effects = effects_of(model_directory, skip)
    targets = every_target(effects)
    found = effects.of(targets)
    whole = reached(effects, effects.frozen.embedding, effects.frozen.written)
    np.testing.assert_allclose(found.values, whole, rtol=1e-4, atol=1e-4)
    largest = np.abs(found.effects).max(1)
    assert (np.abs(found.effects.sum(1, dtype=np.float64) + found.constants - whole) < 1e-5 * largest).all()
    nodes = effects.nodes
    draw = np.random.default_rng(0)
    for kind in (LATENT, ERROR, TOKEN):
        for layer in np.unique(nodes.layer[nodes.kind == kind]):
            own = np.flatnonzero((nodes.kind == kind) & (nodes.layer == layer))
            reaching = nodes.position[own] == len(TOKENS) - 1 if layer == 2 else nodes.position[own] > 0
            source = int(
                draw.choice(own[reaching])
            )  # of the last layer only the last position reaches a logit
            changed = whole - reached(effects, *without(effects, source))
            effect = found.effects[:, source]
            assert (np.abs(effect - changed) < 1e-5 * largest).all()
            assert np.abs(effect / largest).max() > 1e-3, "the source reaches nothing"


def test_an_effect_is_that_of_residual_and_heads(llama: Path) -> None:
    """Layer 0 -> layer 1 by plain Hugging Face modules: (1 + sum of heads pattern * V O) / norms, no hook of ours."""
    effects = effects_of(llama)
    hf = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    block, caught = hf.model.layers[1], {}
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(block, name)
        norm.register_forward_pre_hook(lambda module, args, name=name: caught.__setitem__(name, args[0][0]))
    with torch.no_grad():
        pattern = hf(TOKENS[None], output_attentions=True).attentions[1][0]
    scale = {
        name: torch.rsqrt(x.pow(2).mean(-1) + getattr(block, name).variance_epsilon)
        for name, x in caught.items()
    }
    heads, width = pattern.shape[0], hf.config.head_dim
    V = block.self_attn.v_proj.weight.detach().view(-1, width, hf.config.hidden_size).repeat_interleave(2, 0)
    O = block.self_attn.o_proj.weight.detach().view(hf.config.hidden_size, heads, width)  # noqa: E741
    nodes = effects.nodes
    sources = np.flatnonzero((nodes.kind == LATENT) & (nodes.layer == 0))[::3]
    targets = np.flatnonzero((nodes.kind == LATENT) & (nodes.layer == 1))[::5]
    found = effects.of(targets).effects[:, sources]
    for s, source in enumerate(sources):
        p = int(nodes.position[source])
        written = float(nodes.value[source]) * effects.coders[0].W_dec[nodes.number[source]]
        read = written * block.input_layernorm.weight.detach() * scale["input_layernorm"][p]
        by_head = torch.einsum("hwd,d,ohw->ho", V, read, O)
        for t, target in enumerate(targets):
            q = int(nodes.position[target])
            moved = (pattern[:, q, p][:, None] * by_head).sum(0) + (written if p == q else 0)
            row = effects.coders[1].W_enc[nodes.number[target]]
            expected = float(row @ moved * scale["post_attention_layernorm"][q])
            assert found[t, s] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_no_effect_goes_back_in_text_or_down_in_layers(llama: Path) -> None:
    effects = effects_of(llama)
    targets = every_target(effects)
    found, nodes = effects.of(targets).effects, effects.nodes
    s = slice(effects.n_sources)
    later = nodes.position[s] > nodes.position[targets][:, None]
    above = nodes.layer[s] >= nodes.layer[targets][:, None]
    assert (found[later | above] == 0).all()
    assert (found[~(later | above)] != 0).mean() > 0.8


def test_a_first_token_that_begins_every_text_has_no_error_and_another_has(llama: Path) -> None:
    for begins in (True, False):
        effects = effects_of(llama, begins=begins)
        sizes = torch.stack([error[0].norm() for error in effects.errors])
        assert (sizes == 0).all() == begins, sizes
        effects.of(every_target(effects))  # sums are checked


def test_the_likeliest_tokens_are_the_targets(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribute, "MASS", 0.02)
    effects = effects_of(llama)
    logits = effects.model.bridge(TOKENS[None], return_type="logits")[0, -1]
    expected = logits.softmax(-1).sort(descending=True)
    of = effects.nodes.kind == LOGIT
    n = int(of.sum())
    assert effects.nodes.number[of].tolist() == expected.indices[:n].tolist()
    assert expected.values[: n - 1].sum() < 0.02 <= expected.values[:n].sum()


@pytest.mark.parametrize("held", ["hook_pattern", "hook_scale"])
def test_what_cannot_be_held_fixed_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    """As where a family's norm or attention does not run through the bridge's hooks."""
    monkeypatch.setattr(frozen, "HELD", (held,))
    effects = effects_of(llama)
    with pytest.raises(InputError, match=r"sum to another value than it has .* cannot be traced"):
        effects.of(every_target(effects))


def test_a_norm_that_cannot_be_held_is_refused(tmp_path: Path) -> None:
    """OLMo's has no gain, which the bridge takes for granted where a hook sets the norm's scale."""
    model = load(save_model(tmp_path / "olmo", "olmo"))
    with pytest.raises(
        InputError, match=r"TransformerLens cannot hold its norms .* no attribute 'weight'; circuits"
    ):
        Effects(model, coders_of(model), text())


def test_logits_that_are_not_the_unembeddings_are_refused(tmp_path: Path) -> None:
    """Granite divides its logits by a number of its own."""
    directory = save_model(tmp_path / "granite", "granite", logits_scaling=3.0)
    model = load(directory)
    with pytest.raises(InputError, match="logits are not its unembedding times its final norm's output"):
        Effects(model, coders_of(model), text())


def test_a_text_of_one_token_has_a_circuit(llama: Path) -> None:
    model = load(llama)
    for tokens, begins in ((TOKENS[:2], True), (TOKENS[1:2], False)):
        effects = Effects(model, coders_of(model), text(tokens, begins))
        graph = attribute.attribute(effects, 100)
        assert (graph.nodes.kind == LOGIT).sum() == 10
        assert len(tokens) > 1 or not (graph.nodes.kind == LATENT).any()


def test_a_graph_beyond_memory_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribute, "EFFECTS", 1000)
    with pytest.raises(InputError, match=r"text: its \d+ active latents .* shorter text, fewer --nodes"):
        attribute.attribute(effects_of(llama), 100)


def test_parts_of_a_backward_pass_are_the_whole(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = effects_of(llama)
    targets = every_target(effects)
    whole = effects.of(targets).effects
    monkeypatch.setattr(attribute, "PULLED", 1)
    np.testing.assert_allclose(effects.of(targets).effects, whole, rtol=1e-4, atol=1e-6)


def test_special_tokens_keep_their_own_mlp(llama: Path) -> None:
    """A position without a row has no latent; its MLP's output is all error."""
    model, kept = load(llama), text().kept.clone()
    kept[3] = False
    effects = Effects(model, coders_of(model), Text(TOKENS, kept, True))
    nodes = effects.nodes
    assert 3 not in nodes.position[nodes.kind == LATENT]
    for error, output in zip(effects.errors, effects.frozen.outputs, strict=True):
        torch.testing.assert_close(error[3], output[3])
    effects.of(every_target(effects))
