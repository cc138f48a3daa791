"""Which latents fire on marked rows, in which contexts, and what they write: against dense activations."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InputError
from evaluate.questions import Questions, firings
from evaluate.questions import separation as separation_module
from evaluate.questions.firings import Firings
from evaluate.questions.separation import separation
from shards import Store
from tests.evaluate.fakes import random_coder, random_rows
from tests.evaluate.runs import D_IN, D_OUT, ENDS, make_run, tiny_transcoder
from tests.fixtures import make_store


def firings_of(acts: np.ndarray) -> Firings:
    """Of dense activations [n, F], by the definition."""
    rows, values, bounds = [], [], [0]
    for column in acts.T:
        own = np.flatnonzero(column)
        own = own[np.argsort(column[own], kind="stable")]
        rows.append(own)
        values.append(column[own])
        bounds.append(bounds[-1] + len(own))
    values = np.concatenate(values).astype(np.float32)
    return Firings(np.concatenate(rows).astype(np.int32), values, np.array(bounds), len(acts))


def auc_by_pairs(acts: np.ndarray, mask: np.ndarray) -> float:
    """Every pair of a marked and another row."""
    difference = acts[mask][:, None].astype(float) - acts[~mask][None]
    return float((np.sign(difference) + 1).mean() / 2)


# sklearn.metrics 1.9.1: roc_auc_score(MASK, acts); precision_score, recall_score and f1_score of acts > 0
MASK = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool)
BY_SCIKIT_LEARN = [
    ([0, 0, 0, 0, 0, 0, 0, 0], 0.5, np.nan, 0.0, 0.0),
    ([2, 1, 3, 0, 0, 0, 0, 0.5], 1.0, 1.0, 1.0, 1.0),
    ([1, 0, 1, 1, 1, 0, 0, 0], 0.5, 0.5, 0.5, 0.5),
    ([0, 2, 0.5, 2, 0.5, 0.25, 0, 0], 0.4375, 0.4, 0.5, 0.4444444444444444),
    ([0, 0, 0, 3, 1, 0, 0, 0], 0.25, 0.0, 0.0, 0.0),
    ([4, 3, 2, 1, 1, 1, 1, 1], 0.875, 0.5, 1.0, 0.6666666666666666),
]


def test_what_scikit_learn_says() -> None:
    acts = np.array([line[0] for line in BY_SCIKIT_LEARN]).T
    found = separation(firings_of(acts), MASK)
    expected = np.array([line[1:] for line in BY_SCIKIT_LEARN])
    own = np.stack([found.auc, found.precision, found.recall, found.f1], 1)
    np.testing.assert_array_equal(own, expected)


def test_what_scikit_learn_says_of_many_rows() -> None:
    """1,000 rows with ties at zero and elsewhere; roc_auc_score of scikit-learn 1.9.1."""
    i = np.arange(1000)
    mask = i * 7 % 11 < 3
    acts = np.stack([np.maximum(i * 37 % 23 - cut + 4 * (mask & (i % 3 == 0)), 0) for cut in (0, 12, 21)], 1)
    found = separation(firings_of(acts.astype(float)), mask)
    assert found.auc == pytest.approx(AUC_OF_MANY, rel=1e-12)


AUC_OF_MANY = [0.5574240065299212, 0.5489416589829245, 0.5292234129923263]


@given(
    acts=st.lists(
        st.lists(st.sampled_from([0, 0, 1, 2, 2.5]), min_size=3, max_size=3), min_size=2, max_size=9
    ),
    seed=st.integers(0, 99),
    block=st.sampled_from([1, 4, 1 << 20]),
)
def test_every_number_is_its_definition(acts: list[list[float]], seed: int, block: int) -> None:
    """Whatever the ties, and however many firings are ranked together."""
    dense, draw = np.array(acts), np.random.default_rng(seed)
    mask = draw.random(len(dense)) < 0.5
    mask[:2] = True, False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separation_module, "BLOCK", block)
        found = separation(firings_of(dense), mask)
    fires = dense > 0
    assert found.firings.tolist() == fires.sum(0).tolist()
    assert found.hits.tolist() == fires[mask].sum(0).tolist()
    for f in range(3):
        assert found.auc[f] == pytest.approx(auc_by_pairs(dense[:, f], mask), abs=1e-12)
        hit, own = fires[mask, f].sum(), fires[:, f].sum()
        assert found.recall[f] == hit / mask.sum()
        np.testing.assert_equal(found.precision[f], hit / own if own else np.nan)
        both = (hit / own if own else 0) + hit / mask.sum()
        assert found.f1[f] == pytest.approx(2 * (hit / own) * (hit / mask.sum()) / both if both else 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_run(
        tmp_path_factory.mktemp("run"), vocabulary=["<s>", "</s>", "<b>", *(f"w{i}" for i in range(30))]
    )


@pytest.fixture(scope="module")
def ask(store: Store) -> Questions:
    return Questions(store, tiny_transcoder(), device="cpu")


def dense(store: Store, n: int = 1500) -> np.ndarray:
    """[n, F] activations, by the transcoder's own encode."""
    return tiny_transcoder().encode(store.heldout.rows(0, n)[0]).numpy()


def test_latents_for_rows_of_a_store(store: Store, ask: Questions) -> None:
    """Those of all latents, against activations as `encode` gives them."""
    mask, acts = store.find(r"w[1-5]\b").mask, dense(store)
    assert 100 < mask.sum() < 400
    table = ask.latents_for(mask)
    assert table.index.name == "latent"
    assert sorted(table.index) == list(range(ENDS[-1]))
    assert list(table.columns) == ["f1", "precision", "recall", "auc", "firings", "hits"]
    assert table.f1.is_monotonic_decreasing
    for f in range(ENDS[-1]):
        fires, line = acts[:, f] > 0, table.loc[f]
        assert (line.firings, line.hits) == (fires.sum(), fires[mask].sum())
        assert line.auc == pytest.approx(auc_by_pairs(acts[:, f], mask), abs=1e-9)
    assert ask.latents_for(torch.from_numpy(mask), by="auc").auc.is_monotonic_decreasing
    assert "<b>" not in ask.latents_for(mask)._repr_html_()  # pyright: ignore[reportCallIssue]


def test_a_latent_that_is_a_word_is_found(tmp_path: Path) -> None:
    """Latent 5 reads the dimension that is 1 on the rows of one word and 0.1 on a few others."""
    draw = np.random.default_rng(0)
    rows = np.zeros((900, D_IN), np.float32), np.zeros((900, D_OUT), np.float32)
    blank = make_store(tmp_path / "blank.zarr", rows, rows)
    context, position = blank.heldout.provenance(0, 900)
    token = blank.heldout.contexts[:][context, position]
    of_word, noise = token == 42, draw.random(900) < 0.01
    inputs = np.zeros((900, D_IN), np.float32)
    inputs[:, 0] = np.where(of_word, 1.0, np.where(noise, 0.1, 0.0))
    kept = np.empty_like(inputs)
    kept[context * 15 + position - 1] = inputs  # make_store takes rows in the order of the text
    store = make_store(tmp_path / "s.zarr", rows, (kept, rows[1]))
    coder = random_coder(D_IN, D_OUT, (24,))
    coder.parameters.W_enc[:], coder.parameters.b_enc[:], coder.thresholds[:] = 0, 0, 0.05
    coder.parameters.W_enc[5, 0] = 2
    ask = Questions(store, coder, device="cpu")
    mask = store.find("word40").mask  # ids 0 and 1 are special
    assert np.array_equal(mask, of_word)
    line = ask.latents_for(mask).iloc[0]
    others = (noise & ~of_word).sum()
    assert (line.name, line.recall, line.auc) == (5, 1.0, 1.0)
    assert line.precision == of_word.sum() / (of_word.sum() + others)
    found = ask.contexts_of(5, n=1000)
    assert [each.activation for each in found][: len(found) - 1].count(2.0) > 3
    assert all(each.tokens[each.focus] == " word40" for each in found if each.activation == 2.0)


def test_contexts_are_those_of_the_store(store: Store, ask: Questions) -> None:
    """The strongest row of each context, strongest first; activations around it are `encode`'s."""
    acts, length = dense(store), store.heldout.contexts.shape[1]
    context, position = (each.astype(int) for each in store.heldout.provenance(0, 1500))
    grid = np.zeros((len(store.heldout.contexts), length, ENDS[-1]), np.float32)
    grid[context, position] = acts
    for f in range(ENDS[-1]):
        found = ask.contexts_of(f, n=7, reach=3)
        best = np.sort(grid[:, :, f].max(1))[::-1][:7]
        np.testing.assert_allclose([each.activation for each in found], best[best > 0], rtol=1e-5)
        assert len({each.context for each in found}) == len(found)
        for each in found:
            assert (context[each.row], position[each.row]) == (each.context, each.position)
            first = max(each.position - 3, 0)
            around = grid[each.context, first : each.position + 4, f]
            np.testing.assert_allclose(each.activations, around, rtol=1e-5, atol=1e-6)
            assert each.focus == each.position - first
            assert each.activations[each.focus] == np.float32(each.activation)
            assert len(each.tokens) == len(each.activations)
            assert each.tokens[each.focus] == store.heldout.tokens(each.row, each.row + 1).texts[0]
    chosen = position < 5
    early = ask.contexts_of(0, n=3, mask=chosen)
    best = np.sort(np.where(np.arange(length) < 5, grid[:, :, 0], 0).max(1))[::-1][:3]
    np.testing.assert_allclose([each.activation for each in early], best, rtol=1e-5)
    assert any(each.activations[each.focus + 1 :].any() for each in early)  # what is around is not masked
    page = ask.contexts_of(0)._repr_html_()
    assert page.count("<b>") == len(ask.contexts_of(0)) == 10  # the word <b> is escaped
    assert "&lt;" in page
    assert str(ask.contexts_of(0)).startswith(
        f"latent 0: fires on {int((acts[:, 0] > 0).sum()):,} of 1,500 rows\n"
    )


def test_the_first_rows_alone(store: Store) -> None:
    """A number of rows, the same for both."""
    ask, mask = Questions(store, tiny_transcoder(), rows=400, device="cpu"), store.find("w7", rows=400).mask
    acts = dense(store, 400)
    assert ask.latents_for(mask).firings.sort_index().tolist() == (acts > 0).sum(0).tolist()
    assert max(each.row for each in ask.contexts_of(3, n=100)) < 400
    with pytest.raises(InputError, match=r"mask: expected bool \[400\], .* found bool \[1500\]"):
        ask.latents_for(store.find("w7").mask)


def test_a_latent_that_never_fires(store: Store) -> None:
    coder = tiny_transcoder()
    coder.parameters.W_enc[7], coder.parameters.b_enc[7] = 0, -1
    ask = Questions(store, coder, device="cpu")
    line = ask.latents_for(store.find("w7").mask).loc[7]
    assert line[["f1", "recall", "auc", "firings", "hits"]].tolist() == [0, 0, 0.5, 0, 0]
    assert np.isnan(line.precision)
    assert list(ask.contexts_of(7)) == []
    assert "latent 7: fires on 0 of 1,500 rows" in ask.contexts_of(7)._repr_html_()


def test_what_cannot_be_asked(store: Store, ask: Questions, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = store.find("w7").mask
    for wrong, message in (
        (
            store.find("w7"),
            r"mask: expected bool \[1500\], one for each row \(Found.mask, say\), found object \[\]",
        ),
        (store.find("w7").rows, r"found int64 \["),
        (mask[1:], r"found bool \[1499\]"),
        (
            store.find("absent").mask,
            "mask: expected some of the 1,500 rows to be marked and others not, found 0",
        ),
        (np.ones(1500, bool), "found 1,500 marked"),
    ):
        with pytest.raises(InputError, match=message):
            ask.latents_for(wrong)
    with pytest.raises(InputError, match=r"by: expected one of f1, precision, recall, auc, .* found 'best'"):
        ask.latents_for(mask, by="best")
    for latent in (-1, 24):
        with pytest.raises(InputError, match=f"latent: expected 0 to 23, found {latent}"):
            ask.contexts_of(latent)
    with pytest.raises(InputError, match="n from 1 and reach from 0, found 0 and 16"):
        ask.contexts_of(0, n=0)
    for rows in (0, 1501):
        with pytest.raises(
            InputError, match=f"rows: expected 1 to 1500, those of split heldout, found {rows}"
        ):
            Questions(store, tiny_transcoder(), rows=rows)
    with pytest.raises(InputError, match="split: expected train or heldout, found 'test'"):
        Questions(store, tiny_transcoder(), split="test")
    with pytest.raises(InputError, match="expected widths 6 -> 5"):
        Questions(store, random_coder(D_IN + 1, D_OUT, ENDS))
    monkeypatch.setattr(firings, "MOST", 3000)
    with pytest.raises(
        InputError, match=r"rows: expected at most about \d+, as \d+ latents are active on a row"
    ):
        Questions(store, tiny_transcoder())


def test_rows_of_a_transcoder_that_keeps_k_of_each_row() -> None:
    """Top-k transcoders of other tools, as everything else that reads `entries`."""
    coder, rows = replace(random_coder(D_IN, D_OUT, ENDS), k=3), random_rows(2000, D_IN, D_OUT)
    found, acts = firings.firings(coder, rows, 2000), coder.encode(rows.inputs).numpy()
    for f in range(ENDS[-1]):
        own, values = found.of(f)
        assert sorted(own.tolist()) == np.flatnonzero(acts[:, f]).tolist()
        np.testing.assert_allclose(values, acts[own, f], rtol=1e-6)
        assert (np.diff(values) >= 0).all()
