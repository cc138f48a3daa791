"""Run by the peers' Python, without this project: load an export with the tool itself and write down what it computes.

python tools.py saelens FOLDER ROWS OUT          SAE.load_from_disk
python tools.py gemma_scope PARAMS ROWS OUT      circuit-tracer's loader of Gemma Scope's transcoders
python tools.py circuit_tracer FOLDER ROWS OUT   circuit-tracer's own loader; ROWS holds inputs_0, inputs_1, ...
python tools.py pages FOLDER LAYER LATENT OUT    circuit-tracer's own model of a page, of every 16th page of the set;
                                                 OUT's header: page of the latent, pages of each layer, scan
python tools.py replace FOLDER MODEL TOKENS OUT  circuit-tracer's replacement model with all MLPs replaced
python tools.py attribute FOLDER MODEL TOKENS OUT  its attribution graph of one context, whole
python tools.py graph GRAPH OUT                  its schema of graph files; OUT: number of nodes and links
python tools.py splice FOLDER MODEL TOKENS OUT   cross-entropy of SAELens' bridge with the transcoder in place;
                                                 TOKENS: tokens and excluded [b, T], where the MLP keeps its output
python tools.py gemma_scope_2 PARAMS ROWS OUT    circuit-tracer's loader of Gemma Scope 2's transcoders
python tools.py again FOLDER TO OUT              SAELens loads a transcoder and saves it in TO
python tools.py make_set FOLDER KIND ROWS OUT    circuit-tracer saves a set of two layers of its own in FOLDER
python tools.py sparsify FOLDER KIND ROWS OUT    sparsify saves a transcoder of its own; OUT has its FVU on outputs
python tools.py make FOLDER KIND ROWS OUT        SAELens saves a transcoder of its own in FOLDER
python tools.py delphi FOLDER TOKENIZER OUT      delphi's loader on its cache of all modules in FOLDER; OUT: of every
                                                 latent that it takes, its windows of tokens and of activations
python tools.py delphi_writes FOLDER ACTS OUT    delphi's own writer on acts [C, T, F] and tokens [C, T] of one module
python tools.py delphi_scores FOLDER TOKENIZER ACTIVE OUT  delphi's detection and fuzzing scorers, whose model knows
                                                 ACTIVE, the windows [n, 32] in which a latent fires; OUT has, of each
                                                 latent, what was right, and what it is when all are said to be active

ROWS: inputs [n, D_in]. OUT: pre [n, F], acts [n, F], outputs [n, D_out] as the tool computes them.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def computed(pre, acts, outputs) -> dict[str, torch.Tensor]:
    return {"pre": pre.contiguous(), "acts": acts.contiguous(), "outputs": outputs.contiguous()}


def saelens(folder: str, rows: str, out: str) -> None:
    from sae_lens import SAE

    sae, x = SAE.load_from_disk(folder), load_file(rows)["inputs"]
    with torch.inference_mode():
        save_file(computed(x @ sae.W_enc + sae.b_enc, sae.encode(x), sae(x)), out)


def gemma_scope(params: str, rows: str, out: str) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

    transcoder, x = load_gemma_scope_transcoder(params, layer=0), load_file(rows)["inputs"]
    pre = transcoder.encode(x, apply_activation_function=False)
    save_file(computed(pre, transcoder.encode(x), transcoder(x)), out)


def gemma_scope_2(params: str, rows: str, out: str) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_2_transcoder

    transcoder, x = load_gemma_scope_2_transcoder(params, layer=0), load_file(rows)["inputs"]
    pre = transcoder.encode(x, apply_activation_function=False)
    save_file(computed(pre, transcoder.encode(x), transcoder(x)), out)


def transcoder_set(folder: str):
    """A local folder is to circuit-tracer a set that was downloaded before: its parent is the cache."""
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    path = Path(folder)
    transcoders, config = load_transcoder_from_hub(path.name, cache_dir=str(path.parent), lazy_decoder=False)
    return transcoders, config


def circuit_tracer(folder: str, rows: str, out: str) -> None:
    transcoders, config = transcoder_set(folder)
    tensors, inputs = {}, load_file(rows)
    for layer, transcoder in enumerate(transcoders):
        x = inputs[f"inputs_{layer}"]
        pre = transcoder.encode(x, apply_activation_function=False)
        values = computed(pre, transcoder.encode(x), transcoder(x))
        tensors |= {f"{name}_{layer}": tensor for name, tensor in values.items()}
    save_file(tensors, out, metadata={"config": json.dumps(config)})


def pages(folder: str, layer: str, latent: str, out: str) -> None:
    import gzip
    import math
    import zlib

    from circuit_tracer.frontend.feature_models import Model
    from circuit_tracer.frontend.graph_models import Node
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    features = Path(folder) / "features"
    index = json.loads(gzip.decompress((features / "index.json.gz").read_bytes()))

    def page(of: int, number: int) -> Model:
        offsets, data = index[str(of)]["offsets"], (features / index[str(of)]["filename"]).read_bytes()
        record = data[offsets[number] : offsets[number + 1]]
        length = int.from_bytes(record[:4], "little")
        return Model.model_validate_json(zlib.decompress(record[4 : 4 + length]))

    number = Node.feature_node(int(layer), 0, int(latent)).feature
    w = (math.isqrt(8 * number + 1) - 1) // 2  # util.js: cantorUnpair
    y = number - w * (w + 1) // 2
    counts = [len(index[str(of)]["offsets"]) - 1 for of in range(len(index))]
    for of, count in enumerate(counts):
        assert [page(of, n).index for n in range(0, count, 16)] == list(range(0, count, 16))
    said = {
        "page": page(w - y, y).model_dump_json(),
        "pages": json.dumps(counts),
        "scan": load_transcoder_from_hub(folder)[0].scan,  # by its full path
    }
    save_file({"layer": torch.tensor(w - y)}, out, metadata=said)


def hooked_transformer(model: str):
    """(configuration, weights) of a Hugging Face directory that transformer-lens has no official name for."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    theirs, gemma = loaded.config, loaded.config.model_type.startswith("gemma")
    values = {
        "d_model": theirs.hidden_size,
        "n_layers": theirs.num_hidden_layers,
        "n_heads": theirs.num_attention_heads,
        "n_key_value_heads": theirs.num_key_value_heads,
        "d_head": theirs.head_dim,
        "rotary_dim": theirs.head_dim,
        "d_mlp": theirs.intermediate_size,
        "d_vocab": theirs.vocab_size,
        "n_ctx": theirs.max_position_embeddings,
        "eps": theirs.rms_norm_eps,
        "rotary_base": theirs.rope_theta,
        "act_fn": "gelu_pytorch_tanh" if gemma else "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "final_rms": True,
        "gated_mlp": True,
        "original_architecture": theirs.architectures[0],
        "model_name": Path(model).name,
        "device": "cpu",
    }
    if gemma:
        values |= {
            "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": theirs.attn_logit_softcapping,
            "output_logits_soft_cap": theirs.final_logit_softcapping,
            "attn_scale": theirs.query_pre_attn_scalar**0.5,
        }
    config = HookedTransformerConfig(**values)
    convert = weight_conversions.convert_gemma_weights if gemma else weight_conversions.convert_llama_weights
    return config, convert(loaded, config), loaded


def replace(folder: str, model: str, tokens: str, out: str) -> None:
    from circuit_tracer import ReplacementModel
    from transformer_lens import HookedTransformer

    transcoders, _ = transcoder_set(folder)
    config, weights, reference = hooked_transformer(model)
    ids = load_file(tokens)["tokens"]
    plain = HookedTransformer(config)
    plain.load_state_dict(weights, strict=False)
    hooks = [name for name in plain.hook_dict if name.endswith(("ln2.hook_normalized", "hook_mlp_out"))]
    with torch.inference_mode():
        logits, cache = plain.run_with_cache(ids, names_filter=hooks)
        tensors = {name: tensor.contiguous() for name, tensor in cache.items()}
        tensors["logits"], tensors["reference"] = logits, reference(ids).logits
    replaced = ReplacementModel.from_config(config, transcoders)
    replaced.load_state_dict(renamed(weights), strict=False)
    for row, tokens_of_row in enumerate(ids):
        _, activations = replaced.get_activations(tokens_of_row)
        tensors[f"acts_{row}"] = activations.detach().to_dense().contiguous()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)


def attribute(folder: str, model: str, tokens: str, out: str) -> None:
    from circuit_tracer import ReplacementModel
    from circuit_tracer import attribute as attributed
    from transformers import AutoTokenizer

    transcoders, _ = transcoder_set(folder)
    config, weights, _ = hooked_transformer(model)
    replaced = ReplacementModel.from_config(config, transcoders)
    replaced.load_state_dict(renamed(weights), strict=False)
    replaced.tokenizer = AutoTokenizer.from_pretrained(model)
    graph = attributed(load_file(tokens)["tokens"], replaced, batch_size=16)
    tensors = {
        "effects": graph.adjacency_matrix,
        "active": graph.active_features[graph.selected_features],
        "values": graph.activation_values[graph.selected_features],
        "logits": graph.logit_token_ids,
        "probabilities": graph.logit_probabilities,
    }
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, out)


def graph(file: str, out: str) -> None:
    from circuit_tracer.frontend.graph_models import Link, Model

    read = Model.model_validate_json(Path(file).read_text())
    links = [Link.model_validate(link) for link in read.links]
    save_file({"nodes": torch.tensor(len(read.nodes)), "links": torch.tensor(len(links))}, out)


def renamed(weights: dict) -> dict:
    """The replacement model wraps every MLP and the unembedding once."""
    inserts = {".mlp.": ".mlp.old_mlp.", "unembed.": "unembed.old_unembed."}
    for old, new in inserts.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return weights


def splice(folder: str, model: str, tokens: str, out: str) -> None:
    from sae_lens import SAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from torch.nn.functional import cross_entropy

    sae, arrays = SAE.load_from_disk(folder), load_file(tokens)
    ids = arrays["tokens"]
    bridge = SAETransformerBridge.boot_transformers(model, device="cpu", dtype=torch.float32)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())

    with torch.inference_mode():
        clean = loss(bridge(ids, return_type="logits"))
        bridge.add_sae(sae)
        for wrapper in bridge._acts_to_saes.values():  # what HookedSAETransformer does for excluded tokens
            wrapper.set_token_mask(arrays["excluded"])
        spliced = loss(bridge(ids, return_type="logits"))
    save_file({"clean": clean, "spliced": spliced}, out)


def make(folder: str, kind: str, rows: str, out: str) -> None:
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    x = load_file(rows)["inputs"]
    config = {
        "architecture": kind,
        "d_in": x.shape[1],
        "d_sae": 24,
        "d_out": 5,
        "apply_b_dec_to_input": False,
    }
    sae = SAE.from_dict(config)
    hooks = {"hook_name": "blocks.0.ln2.hook_normalized", "hook_name_out": "blocks.0.hook_mlp_out"}
    sae.cfg.metadata = SAEMetadata(model_name="tests/tiny", **hooks)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.normal_()
            if name == "threshold":
                parameter.abs_()
        sae.save_model(folder)
        save_file(computed(x @ sae.W_enc + sae.b_enc, sae.encode(x), sae(x)), out)


def again(folder: str, to: str, out: str) -> None:
    from sae_lens import SAE

    SAE.load_from_disk(folder).save_model(to)
    save_file({}, out)


def make_set(folder: str, kind: str, rows: str, out: str) -> None:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    x = load_file(rows)["inputs"]
    torch.manual_seed(0)
    layers, tensors = {}, {}
    for layer in range(2):
        gate = JumpReLU(torch.rand(24), 0.1) if kind == "jumprelu" else torch.nn.functional.relu
        sizes = {"d_model": x.shape[1], "d_transcoder": 24, "activation_function": gate, "layer_idx": layer}
        transcoder = SingleLayerTranscoder(**sizes, skip_connection=kind == "skip", dtype=torch.float32)
        for name, parameter in transcoder.named_parameters():
            if "threshold" not in name:
                torch.nn.init.normal_(parameter)
        layers[layer] = transcoder
        pre = transcoder.encode(x, apply_activation_function=False)
        values = computed(pre, transcoder.encode(x), transcoder(x))
        tensors |= {f"{name}_{layer}": tensor.detach() for name, tensor in values.items()}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    TranscoderSet(layers, **hooks).to_safetensors(folder)
    known = {"model_name": "tests/tiny", "model_kind": "transcoder_set", **hooks}
    Path(folder, "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in known.items()))
    save_file(tensors, out)


def sparsify(folder: str, kind: str, rows: str, out: str) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    tensors = load_file(rows)
    x, y = tensors["inputs"], tensors["outputs"]
    torch.manual_seed(0)
    config = SparseCoderConfig(num_latents=24, k=4, transcode=True, skip_connection=kind == "skip")
    coder = SparseCoder(x.shape[1], config)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_()
        coder.save_to_disk(folder)
        forward = coder(x, y)
        pre = x @ coder.encoder.weight.T + coder.encoder.bias
        acts = torch.zeros_like(pre).scatter_(1, forward.latent_indices, forward.latent_acts)
        save_file(computed(pre, acts, forward.sae_out) | {"fvu": forward.fvu}, out)


def delphi_dataset(folder: str, tokenizer: str, latents=None):
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset
    from transformers import PreTrainedTokenizerFast

    return LatentDataset(
        folder,
        SamplerConfig(n_examples_test=20),
        ConstructorConfig(min_examples=20, n_non_activating=20),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=tokenizer),
        latents=latents,
        modules=None if latents is None else list(latents),
    )


def delphi(folder: str, tokenizer: str, out: str) -> None:
    dataset, tensors = delphi_dataset(folder, tokenizer), {}
    for record in dataset:
        name = f"{record.latent.module_name} {record.latent.latent_index}"
        tensors[f"tokens {name}"] = torch.stack([example.tokens for example in record.examples])
        tensors[f"activations {name}"] = torch.stack([example.activations for example in record.examples])
        tensors[f"frequency {name}"] = torch.tensor(record.per_token_frequency)
    save_file(tensors, out, metadata={"modules": json.dumps(sorted(dataset.modules))})


def delphi_writes(folder: str, acts: str, out: str) -> None:
    from delphi.latents import LatentCache

    dense = load_file(acts)
    cache = LatentCache(None, {}, batch_size=len(dense["acts"]))
    cache.cache.add(dense["acts"], dense["tokens"], 0, "layers.1.mlp")
    cache.cache.save()
    cache.width = dense["acts"].shape[2]
    cache.save_splits(5, Path(folder))
    save_file({"done": torch.ones(1)}, out)


def without_vllm() -> None:
    """delphi.scorers imports the client of a language model on this machine, which is vllm's; neither is asked."""
    import types

    names = {"": "LLM SamplingParams", ".inputs": "TokensPrompt", ".distributed": ""}
    names[".distributed.parallel_state"] = "destroy_distributed_environment destroy_model_parallel"
    for name, attributes in names.items():
        module = sys.modules[f"vllm{name}"] = types.ModuleType(f"vllm{name}")
        for each in attributes.split():
            setattr(module, each, None)


def delphi_scores(folder: str, tokenizer: str, active: str, out: str) -> None:
    import asyncio
    import re

    without_vllm()
    from delphi.clients.client import Client, Response
    from delphi.scorers import DetectionScorer, FuzzingScorer

    class Oracle(Client):
        """Says 1 to the examples whose text is one of `texts`, of all that it is asked; without texts, to all."""

        def __init__(self, texts: set[str] | None) -> None:
            super().__init__("oracle")
            self.texts = texts

        async def generate(self, prompt, **_):
            asked = re.split(r"Example \d+: ", prompt[-1]["content"].partition("Text examples:")[2])[1:]
            plain = [re.sub("<<|>>", "", each).removesuffix("\n").rstrip() for each in asked]
            return Response(str([int(self.texts is None or each in self.texts) for each in plain]))

    windows, tensors = load_file(active), {}
    of_module: dict[str, list[int]] = {}
    for name in windows:
        module, latent = name.split()
        of_module.setdefault(module, []).append(int(latent))
    dataset = delphi_dataset(folder, tokenizer, {m: torch.tensor(sorted(f)) for m, f in of_module.items()})
    for record in dataset:
        name = f"{record.latent.module_name} {record.latent.latent_index}"
        texts = {"".join(dataset.tokenizer.batch_decode(window)).rstrip() for window in windows[name]}
        record.explanation = "known to the oracle"
        for scorer in (DetectionScorer, FuzzingScorer):
            for who, known in (("oracle", texts), ("all", None)):
                score = asyncio.run(scorer(Oracle(known), n_examples_shown=5)(record)).score
                assert all(each.correct is not None for each in score)
                tensors[f"{scorer.name} {who} {name}"] = torch.tensor([each.correct for each in score])
    save_file(tensors, out)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
