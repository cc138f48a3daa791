"""The language model: load it, and capture tensors at hook points. The only file that imports transformer_lens.

Shapes: b contexts, T positions, D model width.
"""

import contextlib
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from common.device import pick_device
from common.errors import ENVIRONMENT, InputError, first_line
from common.hooks import INPUT_HOOKS, OUTPUT_HOOK
from common.identity import TOKENIZERS, is_gguf, refuse_pointer, tensors_of, weight_files
from common.settings import Model
from harvest import gguf
from harvest.embedded import MODELS, model_directory
from harvest.sealed import sealed
from shards.device.copies import sent
from shards.store import as_harvested

TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tiktoken.model", *TOKENIZERS)
NEEDED = (*INPUT_HOOKS.values(), OUTPUT_HOOK)


class Gain(NamedTuple):
    """What the norm before an MLP multiplies and adds after normalising."""

    values: torch.Tensor
    """[D] float32 with mlp_in = normalized * values + bias"""
    bias: torch.Tensor | None
    """[D] float32; a LayerNorm has one, an RMSNorm has none."""
    error: float
    """Largest relative deviation found on real activations."""


class Unembedding(NamedTuple):
    """What a token's logit, less the mean logit of the vocabulary, reads of the final norm's output."""

    directions: torch.Tensor
    """[n, D] float32"""
    biases: torch.Tensor
    """[n] float32"""
    error: float
    """Largest deviation of the model's logits from its unembedding's, but for a soft cap; relative to the largest."""


class LanguageModel:
    """A TransformerLens bridge without weight processing: logits equal Hugging Face's eager ones."""

    def __init__(self, bridge: Any, name: str) -> None:
        self.bridge = bridge
        self.name = name
        self.n_layers: int = bridge.cfg.n_layers
        self.d_model: int = bridge.cfg.d_model
        self.tokens: int = bridge.original_model.get_input_embeddings().num_embeddings
        config = bridge.original_model.config.get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        """Tokens of the longest context; none where the model names no limit (ALiBi)."""
        self.device = torch.device(bridge.cfg.device)
        self.dtype: torch.dtype = next(bridge.original_model.parameters()).dtype

    @contextlib.contextmanager
    def capturing(self, names: list[str]) -> Iterator[dict[str, torch.Tensor]]:
        """While open, every forward pass leaves the tensors at these hook points in the yielded dict.

        Raises what `check_hooks` does.
        """
        caught: dict[str, torch.Tensor] = {}
        with self.giving(names, caught.__setitem__):
            yield caught

    @contextlib.contextmanager
    def giving(self, names: list[str], take: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
        """While open, every forward pass gives the tensors at these hook points to `take`, each when it is there.

        Hooks are attached once: resolving them anew costs 60 ms a call. Raises what `check_hooks` does.
        """

        def give(name: str) -> Any:
            return lambda tensor, **_: (
                take(name, tensor) and None
            )  # what a hook returns takes the tensor's place

        self.check_hooks(names)
        with self.bridge.hooks(fwd_hooks=[(name, give(name)) for name in names]):
            yield

    def has_hook(self, name: str) -> bool:
        """Whether there is a hook point of this name (blocks.L.name)."""
        return name in self.bridge.hook_dict

    def run_blocks(self, tokens: torch.Tensor, last_layer: int) -> None:
        """Forward pass [b, T] through block `last_layer` and no further; hooks see what they see."""
        tokens = sent(tokens, self.device)
        with torch.inference_mode():
            if last_layer + 1 < self.n_layers:
                self.bridge(tokens, return_type=None, stop_at_layer=last_layer + 1)
            else:  # stop_at_layer=n_layers does not stop: keep one position's logits instead of all
                self.bridge(tokens, return_type=None, logits_to_keep=1)

    def check_hooks(self, names: Iterable[str]) -> None:
        """Raise `InputError` that lists the layer's hook points when one of these (blocks.L.name) is not there."""
        for name in names:
            if name not in self.bridge.hook_dict:
                prefix = ".".join(name.split(".")[:2]) + "."
                known = (
                    hook.removeprefix(prefix) for hook in self.bridge.hook_dict if hook.startswith(prefix)
                )
                raise InputError(
                    f"{self.name}: no hook point {name}; a layer needs {', '.join(NEEDED)} (pre-norm blocks: Llama, "
                    f"Gemma, Qwen, Mistral, GPT-2, GPT-NeoX, ...), this one has {', '.join(sorted(known)) or 'none'}"
                )

    def gain(self, layer: int) -> Gain:
        """What the norm before the MLP of `layer` does after normalising, checked on a few tokens.

        The raw Hugging Face weight is w; Llama's and GPT-2's gain is w, Gemma's is 1 + w. Which one holds is read
        off the activations, never guessed from a name. Raises `InputError` when neither does.
        """
        tokens = torch.arange(32).reshape(2, 16) * (self.bridge.cfg.d_vocab // 32)
        hooks = {kind: f"blocks.{layer}.{hook}" for kind, hook in INPUT_HOOKS.items()}
        with self.capturing(list(hooks.values())) as caught:
            try:
                self.run_blocks(tokens, layer)
            except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
                raise InputError(
                    f"{self.name} layer {layer}: TransformerLens cannot run this model: {first_line(error)}; "
                    "its config.json does not fit its weights, or this family cannot be harvested"
                ) from error
            normalized, mlp_in = (caught[hooks[kind]].float() for kind in ("normalized", "mlp_in"))
        if normalized.shape != mlp_in.shape:  # OPT: all positions in one row
            raise InputError(
                f"{self.name} layer {layer}: expected one shape at {NEEDED[0]} and {NEEDED[1]}, found "
                f"{tuple(normalized.shape)} and {tuple(mlp_in.shape)}; this family cannot be harvested"
            )
        best = gain_of(self.bridge.blocks[layer].ln2.original_component, normalized, mlp_in)
        tolerance = 4 * torch.finfo(self.dtype).eps
        if not best.error <= tolerance:  # NaN too
            raise InputError(
                f"{self.name} layer {layer}: the MLP's input is not its normalised input times a gain (deviation "
                f"{best.error:.2g}, expected at most {tolerance:.2g}); this norm is neither RMSNorm nor LayerNorm"
            )
        return best

    def unembedding(self, tokens: torch.Tensor, read: torch.Tensor, logits: torch.Tensor) -> "Unembedding":
        """Of `tokens` [n]; `read` [D] and `logits` [V] of one position: what the final norm gives, and the model."""
        head = self.bridge.original_model.get_output_embeddings()
        weight, bias = head.weight.detach(), getattr(head, "bias", None)
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()
        plain = torch.nn.functional.linear(read.to(weight), weight, bias).float()
        config = self.bridge.original_model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        error = _deviation(cap * torch.tanh(plain / cap) if cap else plain, logits.float())
        directions = weight[tokens].float() - weight.mean(0, dtype=torch.float32)
        return Unembedding(directions, bias[tokens].float() - bias.mean(dtype=torch.float32), error)

    def weights_sha256(self) -> str:
        """Digest of every parameter and buffer, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.bridge.original_model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # reshape: a tensor without dimensions (Apertus' activation) cannot be viewed as bytes
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def gain_of(norm: torch.nn.Module, normalized: torch.Tensor, out: torch.Tensor) -> Gain:
    """What a norm multiplies and adds after normalising, read off what it made: [..., D] both."""
    weight, bias = (_vector(getattr(norm, name, None)) for name in ("weight", "bias"))
    weight = torch.ones_like(normalized[0, 0]) if weight is None else weight
    shift = 0.0 if bias is None else bias
    candidates = [
        Gain(gain, bias, _deviation(normalized * gain + shift, out)) for gain in (weight, 1 + weight)
    ]
    return min(candidates, key=lambda candidate: candidate.error)


def _vector(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.detach().float()


def _deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, relative to the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """float32 on CPU; on GPUs bfloat16 where there is such hardware, else float16 (T4)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def locate(model: Model) -> str:
    """What `from_pretrained` takes: a local directory, or a hub name that can be reached or is cached.

    A .gguf file becomes a directory first, once. Raises `InputError` in seconds when there is no such model;
    transformers itself retries for half a minute.
    """
    if model.name in MODELS or model.name.startswith("embedded/"):
        return str(model_directory(model.name))
    if is_gguf(model.name):
        return str(gguf.directory_of(Path(model.name)))
    if Path(model.name).is_file():
        raise InputError(
            f"model.name: {model.name} is a file but not a .gguf; expected a directory with config.json, a tokenizer "
            "and .safetensors, or a .gguf file"
        )
    if Path(model.name).is_dir():
        if (Path(model.name) / "adapter_config.json").is_file():
            raise InputError(
                f"model.name: {model.name} has an adapter (adapter_config.json), which is not applied; give a "
                "directory of the merged model (merge_and_unload() in peft, then save_pretrained())"
            )
        if not (Path(model.name) / "config.json").is_file():
            raise InputError(
                f"model.name: {model.name} has no config.json; expected a Hugging Face model directory"
            )
        if not list(Path(model.name).glob("*.safetensors")):
            raise InputError(
                f"model.name: {model.name} has no .safetensors file; pickled weights (.bin, .pt) are not read: "
                "if you trust it, load it with transformers and save it with save_pretrained()"
            )
        return model.name
    if model.name.startswith((".", "/", "~", "$")):
        why = "; ~ and $ are not expanded here: give the whole path" if model.name[0] in "~$" else ""
        raise InputError(f"model.name: no such directory {model.name}{why}")
    if "://" in model.name:
        raise InputError(
            f"model.name: {model.name} is an address; expected owner/name as on the hub, or a directory"
        )
    return _locate_on_hub(model)


def _locate_on_hub(model: Model) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().model_info(model.name, revision=model.revision, timeout=10)
        # A gated model tells everyone about itself; its first file shows whether there is access.
        huggingface_hub.hf_hub_download(model.name, "config.json", revision=model.revision)
    except errors.GatedRepoError as error:
        raise InputError(
            f"model {model.name}: access is gated; accept its licence on the hub and set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"model {model.name}: not found on the Hugging Face hub ({first_line(error)})"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise InputError(
            f"model {model.name}: has no config.json on the hub; expected a Hugging Face model"
        ) from error
    except Exception as error:  # whatever the HTTP library raises when there is no network
        try:
            return huggingface_hub.snapshot_download(
                model.name, revision=model.revision, local_files_only=True
            )
        except (errors.LocalEntryNotFoundError, OSError):
            raise InputError(
                f"model {model.name}: the Hugging Face hub could not be reached ({first_line(error)}) and the model is "
                "not in the local cache; go online, or give --model.name <local directory>; "
                "make demo needs no hub"
            ) from error
    return model.name


def load_tokenizer(where: str, revision: str | None) -> PreTrainedTokenizerFast:
    """Tokenizer with special-token parsing off: `<|im_start|>` in a web page is text, not a token.

    Raises `InputError` where there is none: transformers makes up an empty one of some classes (LlamaTokenizer).
    """
    if (own := Path(where) / "tokenizer.json").is_file():
        refuse_pointer(own)
    try:
        with sealed(network=not Path(where).is_dir()):
            tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a bad file makes it
        why = _why(error)
        if Path(where).is_dir() and not (Path(where) / "tokenizer.json").is_file():
            why = "there is no tokenizer.json beside the weights; copy it there"
        raise InputError(f"model {where}: its tokenizer cannot be loaded: {why}") from error
    directory = files_directory(where, revision)
    if not any(
        (directory / name).is_file() for name in (*tokenizer.vocab_files_names.values(), *TOKENIZER_FILES)
    ):
        raise InputError(
            f"model {where}: has no tokenizer, only its settings; copy tokenizer.json beside the weights"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"model {where}: has no fast tokenizer (tokenizer.json), which the store keeps")
    as_harvested(tokenizer.backend_tokenizer)
    return tokenizer


def _why(error: Exception) -> str:
    """What `transformers` raised, in one line; a model that has code of its own in words of ours."""
    if "trust_remote_code" in str(error):
        return (
            "it needs Python code of its own (auto_map), which is never run; "
            "expected a model whose model_type transformers knows"
        )
    if "pip install" in str(error) and "quanti" in str(error):
        what = re.split(r"[.:(;]* *\(?`?[Pp]lease install|[:(] ?`?pip install", first_line(error))[0]
        return f"{what.strip()}, which this project does not use; give the model as it was before it was quantised"
    if isinstance(error, KeyError):
        return f"its files name {error}, which transformers does not know"
    return first_line(error)


class Shape(NamedTuple):
    """What a model's configuration says without its weights."""

    width: int
    n_layers: int


def shape(where: str, revision: str | None) -> Shape:
    """Model width D and number of layers, from its configuration alone."""
    try:
        with sealed(network=not Path(where).is_dir()):
            config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
        text = config.get_text_config()
        return Shape(text.hidden_size, text.num_hidden_layers)
    except Exception as error:  # transformers raises whatever a bad file makes it
        raise InputError(f"model {where}: its config.json cannot be read: {_why(error)}") from error


def check_layers(layers: Iterable[int], n_layers: int, name: str) -> None:
    """Raise `InputError` for the first of these layers that the model does not have."""
    if absent := [layer for layer in layers if layer >= n_layers]:
        raise InputError(f"layer: {absent[0]} requested, but {name} has layers 0 to {n_layers - 1}")


def files_directory(where: str, revision: str | None) -> Path:
    """Where the files of the model at `where` (see `locate`) lie; of a hub's, those that loading it has left."""
    if not Path(where).is_dir():
        import huggingface_hub

        where = huggingface_hub.snapshot_download(where, revision=revision, local_files_only=True)
    return Path(where)


OF_CODES = re.compile(r"scale|zero|absmax|quant|SCB|g_idx|amax")
"""In the name of what stands beside a weight that is stored as codes."""


def _check_loaded(model: Model, hf_model: Any, info: dict[str, Any], directory: Path) -> None:
    """Raise `ValueError` where what was loaded is not what the files hold; a note of what was left aside.

    Without a quantisation that transformers knows, it takes codes for weights: FVU 2e23 of fp8 with scales.
    """
    if wrong := sorted(info["mismatched_keys"]):
        name, actual, expected = wrong[0]
        raise ValueError(f"{name}: expected shape {tuple(expected)}, found {tuple(actual)}")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"no weights for {missing[0]}{_and_more(missing)}")
    names, unused = set(hf_model.state_dict()), sorted(info["unexpected_keys"])
    stored = {
        name: tensor[0] for path in weight_files(directory) for name, tensor in tensors_of(path).items()
    }
    codes = [
        name for name in sorted(names & stored.keys()) if name.endswith("weight") and stored[name][0] in "IU"
    ]
    codes += [
        name
        for name in unused
        if OF_CODES.search(last := name.rpartition(".")[2]) and f"{name.removesuffix(last)}weight" in names
    ]
    if codes and getattr(hf_model, "hf_quantizer", None) is None:
        raise ValueError(
            f"its weights are stored as codes ({codes[0]}), and config.json names no quantisation that transformers "
            "knows; give the model as it was before it was quantised"
        )
    if unused:
        tqdm.write(
            f"note: {model.name}: config.json has no place for the weights of {unused[0]}{_and_more(unused)}; "
            "they are not used",
            file=sys.stderr,
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def load(model: Model, where: str, tokenizer: PreTrainedTokenizerFast) -> LanguageModel:
    """The model at `where` (see `locate`) on its device, in inference form.

    Raises `InputError` when it cannot be loaded or lacks weights; weights are read from safetensors only.
    """
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    transformers_logging.disable_progress_bar()
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import source

    # An image processor is no use to a text, and where its files are missing, pip is run for torchvision.
    loader: Any = source
    loader.load_modality_processor = lambda *_, **__: None
    try:
        # Loaded here and not by the bridge, because transformers fills what a checkpoint lacks with random
        # numbers and says so in a warning, and because it would read pickles.
        with sealed(network=not Path(where).is_dir()):
            config = AutoConfig.from_pretrained(where, revision=model.revision, trust_remote_code=False)
            # Gemma-2 has no other; the loss is then the same for all. Asked for by argument alone, config.json's own
            # _attn_implementation (Phi-3's: flash_attention_2, or the name of a kernel to download) would go before it.
            config._attn_implementation = "eager"
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                revision=model.revision,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # to be told of them
                output_loading_info=True,
                trust_remote_code=False,
            )
            hf_model, info = loaded
            _check_loaded(model, hf_model, info, files_directory(where, model.revision))
            bridge = TransformerBridge.boot_transformers(
                where,
                device=str(device),
                dtype=dtype,
                hf_model=hf_model.to(device),
                tokenizer=tokenizer,
                trust_remote_code=False,
                **({"revision": model.revision} if model.revision else {}),
            )
    except Exception as error:  # transformers and the bridge raise whatever a bad file makes them
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            raise
        raise InputError(f"model {model.name}: cannot be loaded: {_why(error)}") from error
    bridge.eval()
    return LanguageModel(bridge, model.name)
