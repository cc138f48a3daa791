"""Feature pages as circuit-tracer itself has them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from common.settings import Settings
from evaluate.feature_pages import SetPages
from evaluate.run import evaluate
from shards import Store
from tests.peers.conftest import LAYERS, Peer, heldout
from transcoder import Transcoder
from transcoder.export import export_set

pytestmark = pytest.mark.peers


def test_its_own_model_takes_our_pages_and_its_nodes_number_finds_the_latent(
    runs: dict[str, Settings], peer: Peer, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """Layer 1 is evaluated, layer 0 is not; the set's `scan` is where it lies, so its page asks the local server."""
    settings = runs["demo_1"]
    evaluate(settings, ce_tokens=0)
    both = settings.model_copy(update={"layers": LAYERS})
    folder = export_set(both, partial=True, add=SetPages(both).write)
    rows = heldout(settings, len(Store.of(settings).heldout))
    acts = Transcoder.load(settings.run_dir()).encode(rows)
    latent = int(acts.max(0).values.argmax())
    peer("pages", folder, "1", str(latent))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        said = file.metadata()
    page = json.loads(said["page"])
    assert (page["index"], page["transcoder_id"]) == (latent, "layer_1")
    own = acts[:, latent]
    assert page["act_max"] == pytest.approx(float(own.max()), rel=1e-4)
    assert page["activation_frequency"] == pytest.approx(float((own > 0).double().mean()), rel=1e-6)
    best = page["examples_quantiles"][0]["examples"][0]
    assert best["tokens_acts_list"][best["train_token_ind"]] == page["act_max"]
    assert said["scan"] == str(folder)
    assert said["pages"] == json.dumps([1152, 1152])
    record_property(
        "bytes a page", sum(file.stat().st_size for file in (folder / "features").iterdir()) / 2304
    )
