"""The straight line: text pass -> model -> windows -> one committed store per layer."""

import contextlib
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from common.errors import InputError, shown
from common.files import sha256, write_whole
from common.hooks import hooks_of
from common.identity import (
    chat_template_sha256,
    described_sha256,
    description_sha256,
    differs,
    directory_sha256,
    model_sha256,
)
from common.processes import Processes, joined, rank
from common.progress import progress
from common.settings import Data, Model, Settings
from harvest import lm
from harvest.files import found_files, has_columns
from harvest.text import Packed, RowCounts, Special, SpecialStrings, documents, is_heldout, pack_splits
from harvest.windows import run_windows
from shards.codecs import Compressor
from shards.layout import CHUNK_ROWS, SHARD_ROWS
from shards.manifest import NAMES, SPLITS, Manifest, Source
from shards.objects.scratch import Scratch
from shards.objects.writer import writer_of
from shards.plan import human, plan_of, rows_in_words, shortage
from shards.remote import is_url
from shards.storage import STORAGES
from shards.store import Store, as_harvested
from shards.text.contexts import ContextWriter
from shards.writer import StoreWriter, Text


def harvest(settings: Settings, force: bool = False, refill: bool = False) -> list[Path]:
    """Write one store per layer of `settings.layers`, or continue where an earlier run was stopped. Returns their
    directories; none of stores at an address.

    `refill`: also train rows that were removed after training.
    Raises `InputError` for whatever the user can mend; a killed or failed run leaves resumable stores.
    """
    request = requested(settings)
    todo = to_harvest(settings, request, settings.layers if refill else ())
    if todo:
        where = lm.locate(settings.model)  # before anything is written
        with joined() as processes, contextlib.ExitStack() as stack:
            for writer in todo.values():
                if processes.leads and writer.removed:
                    writer.refill()
                stack.enter_context(writer.lock(processes.leads))
                if processes.leads and writer.complete:  # since `to_harvest` looked, before the lock was free
                    raise InputError(
                        f"{writer.where}: another harvest has finished it meanwhile; give the same command again"
                    )
            manifests, failed = _harvest(settings, todo, request, where, force, processes)
        for layer, manifest in manifests.items():  # when what was only for the writing has gone
            _summary(layer, todo[layer], manifest)
        if failed:
            raise _failures(failed, len(todo))
    return [Path(path) for path in map(settings.store_path, settings.layers) if not is_url(path)]


def to_harvest(
    settings: Settings, request: dict[str, Any], refill: Sequence[int] = ()
) -> dict[int, StoreWriter]:
    """The stores that are still to be written, by layer; raises `InputError` where another one has a place.

    `refill`: layers whose train rows are to be written again where they were removed.
    """
    if not settings.layers:
        raise InputError("layer: none given; for example LAYER=17 (--layer 17)")
    scratch = Scratch(settings.paths.cache / "scratch", settings.paths.scratch_bytes, rank())
    writers = {layer: writer_of(settings.store_path(layer), scratch) for layer in settings.layers}
    return {
        layer: writer
        for layer, writer in writers.items()
        if not _already_there(writer, layer, settings, request, layer in refill)
    }


def requested(settings: Settings) -> dict[str, Any]:
    """What was asked for, by the keys of `Source`; two harvests of one layer differ where this differs."""
    data, options = settings.data, settings.harvest
    inputs, outputs = STORAGES[options.storage].compressors
    if options.compressor != "auto":
        inputs = outputs = Compressor(options.compressor).name
    files = found_files(data).read
    request = {
        "model": settings.model.name,
        "revision": settings.model.revision,
        "model_sha256": model_sha256(settings.model),
        "description_sha256": description_sha256(settings.model),
        "input": options.input,
        "dataset": "files" if data.files else data.dataset,
        "dataset_name": None if files else data.name,
        "dataset_revision": None if files else data.revision,
        "dataset_split": None if files else data.split,
        "text_column": data.text_column if has_columns(files) else "text",
        "files": [sha256(path) for path in files],
        "special_tokens": data.special_tokens,
        "pack": data.pack,
        "context_length": options.context_length,
        "heldout_fraction": options.heldout_fraction,
        "rows": options.rows,
        "seed": options.seed,
        "storage": options.storage,
        "input_compressor": inputs,
        "output_compressor": outputs,
    }
    return request if settings.model.dtype == "auto" else {**request, "dtype": settings.model.dtype}


def _already_there(
    writer: StoreWriter, layer: int, settings: Settings, request: dict[str, Any], refill: bool
) -> bool:
    """Whether the complete store was asked for; raises `InputError` when another one has its place."""
    refuse_another(writer, layer, settings, request)
    if writer.removed:
        if refill:
            return False
        tqdm.write(
            f"layer {layer}: {writer.where} was harvested, and its train rows removed after training; nothing to do "
            "(--refill harvests them again)"
        )
    elif writer.complete:
        tqdm.write(f"layer {layer}: {writer.where} is already harvested, nothing to do")
    return writer.complete


def refuse_another(writer: StoreWriter, layer: int, settings: Settings, request: dict[str, Any]) -> None:
    """Raise `InputError` where the store of a layer is, or was begun as, another harvest than the one asked for.

    One without a window is no obstacle: it is begun anew.
    """
    cache = settings.paths.cache, settings.paths.cache_bytes
    source = (
        Store.open(writer.where, *cache).manifest.source.model_dump() if writer.complete else writer.request
    )
    if source is None or not writer.has_rows:
        return
    if differing := differences(settings, request | {"layer": layer}, source):
        raise InputError(
            f"{writer.where}: holds another harvest ({'; '.join(differing)}); give HARVEST=name to keep both, "
            "or remove it"
        )


def _same(there: Any, now: Any) -> bool:
    """Whether a store was harvested with what is asked; a store of before has its files by name, in no order."""
    return sorted(there.values()) == sorted(now) if isinstance(there, dict) else there == now


def differences(settings: Settings, request: dict[str, Any], source: dict[str, Any]) -> list[str]:
    """In what another harvest was asked for than the one that is there; of the model its weights tell, not its name."""
    other_model = differs(settings.model, source)
    keys = [key for key in request.keys() - NAMES if not _same(source.get(key, request[key]), request[key])]
    differing = {key: f"{key}: there {shown(source[key])}, asked {shown(request[key])}" for key in keys}
    if "files" in differing:
        differing["files"] = _files_differ(source["files"], request["files"], found_files(settings.data).read)
    return ([other_model] if other_model else []) + [differing[key] for key in request if key in keys]


def _files_differ(there: list[str] | dict[str, str], digests: list[str], paths: list[Path]) -> str:
    """Which files of a text are others than a store's, whose names it does not know."""
    before = list(there.values()) if isinstance(there, dict) else there
    if sorted(before) == sorted(digests):
        return f"files: the same {len(digests)}, in another order"
    new = [f"{path} ({shown(each)})" for path, each in zip(paths, digests, strict=True) if each not in before]
    gone = [shown(each) for each in before if each not in digests]
    parts = [
        f"{' and '.join(new[:3])}{' and others' * (len(new) > 3)} not among them" if new else "",
        f"{' and '.join(gone[:3])}{' and others' * (len(gone) > 3)} not asked" if gone else "",
    ]
    said = ", ".join(part for part in parts if part) or "the same ones, not as often"
    return f"files: there {len(before)}, asked {len(digests)}: {said}"


def _harvest(
    settings: Settings,
    writers: dict[int, StoreWriter],
    request: dict[str, Any],
    where: str,
    force: bool,
    processes: Processes,
) -> tuple[dict[int, Manifest], dict[int, InputError]]:
    """Write the stores: the manifest of each layer, where this process is the one that tells of them, and what ended
    the work on the others.
    """
    tokenizer = lm.load_tokenizer(where, settings.model.revision)
    special = Special.of(tokenizer, settings.data.pack, settings.data.special_tokens == "parse")
    first, stores = processes.leads, list(writers.values())
    # Before the text pass: what is wrong with the model shows before anything is written.
    model = lm.load(settings.model, where, tokenizer)
    _check_fit(settings, model, tokenizer, special)
    of_model = _of_model(model, special, _of_files(request, where, settings.model))
    sources = [
        _source(settings, model, layer, request | of_model | _files_as_begun(writer, request))
        for layer, writer in writers.items()
    ]
    if first:
        for writer, source in zip(stores, sources, strict=True):
            _begin_anew(writer, settings, request, source)
        template = chat_template_sha256(lm.files_directory(where, settings.model.revision))
        _text_pass(settings, stores, request, tokenizer, special, model.tokens, template)
    processes.wait()
    for writer in stores:
        if not is_url(writer.where):
            processes.see(writer.work / "plan.json")
        writer.fetch_text()
    _refuse_other_text(stores)
    for writer, source in zip(stores, sources, strict=True):
        writer.begin(_with_template(source, writer), create=first)
    processes.wait()
    check_size = partial(_refuse_if_it_cannot_fit, stores, settings, force)
    if first:
        check_size()
    after_first = check_size if first else lambda: None
    failed = run_windows(model, stores, settings.harvest, after_first, processes)
    processes.wait()
    whole = {layer: writer for layer, writer in writers.items() if first and not writer.missing()}
    manifests = {layer: writer.finish() for layer, writer in whole.items()}
    processes.wait()  # a process that ends with an error ends the others
    return manifests, failed


def _failures(failed: dict[int, InputError], layers: int) -> InputError:
    """One error of the layers that failed; of one that was alone, its own."""
    first = next(iter(failed.values()))
    if layers == 1:
        return first
    rest = (
        f"; layer {' '.join(map(str, sorted(failed)))} failed, the others are harvested"
        if len(failed) < layers
        else ""
    )
    others = "".join(f"; {error}" for error in list(failed.values())[1:])
    return InputError(f"{first}{others}{rest}")


def _files_as_begun(writer: StoreWriter, request: dict[str, Any]) -> dict[str, Any]:
    """An unfinished store of before notes its files by name; where they are the same files, they stay as noted."""
    begun = writer.request
    return {"files": begun["files"]} if begun and _same(begun["files"], request["files"]) else {}


def _with_template(source: Source, writer: StoreWriter) -> Source:
    """The source with the chat template that the text pass has used; none where the text held no chat."""
    begun = writer.request or {}
    return source.model_copy(update={"chat_template_sha256": begun.get("chat_template_sha256")})


def _begin_anew(writer: StoreWriter, settings: Settings, request: dict[str, Any], source: Source) -> None:
    """Forget what was begun otherwise than it is asked for now, where no window of it was written."""
    if writer.has_rows or (begun := writer.request) is None:
        return
    if differences(settings, request, begun) or writer.begun_otherwise(source):
        writer.forget()


# -- text ----------------------------------------------------------------------------------------------


def _text_pass(
    settings: Settings,
    writers: list[StoreWriter],
    request: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    special: Special,
    known: int,
    template: str | None,
) -> None:
    """Leave the same contexts and tokenizer in every store that has none yet; `template`: digest of the chats'.

    Raises `InputError` for a token that the model's embedding, of `known` rows, does not know.
    """
    lacking = [writer for writer in writers if writer.request is None]
    if not lacking:
        return
    first, *others = lacking
    first.clear()
    options, data = settings.harvest, settings.data
    contexts = {split: ContextWriter(first.root, split, options.context_length) for split in SPLITS}
    with progress("text", options.rows, "tokens") as bar:

        def emit(split: str, context: np.ndarray, kept: int) -> None:
            if (largest := int(context.max())) >= known:
                raise _no_embedding(settings.model.name, tokenizer, largest, known)
            contexts[split].append(context)
            if split == "train":
                bar.update(min(kept, options.rows - bar.n))

        heldout = partial(is_heldout, fraction=options.heldout_fraction, seed=options.seed)
        as_harvested(tokenizer.backend_tokenizer, data.special_tokens)  # TransformerLens has had it
        strings, counts = SpecialStrings(tokenizer), RowCounts()
        texts = strings.watch(documents(data, tokenizer, counts))
        packed = pack_splits(texts, tokenizer, special, options.context_length, options.rows, heldout, emit)
    _tell_of_text(data, packed, strings, counts)
    digests = {split: writer.finish() for split, writer in contexts.items()}
    lengths = {split: writer.contexts for split, writer in contexts.items()}
    tokenizer_digest = write_whole(
        first.root / "tokenizer.json", tokenizer.backend_tokenizer.to_str().encode()
    )
    text = Text(packed.rows, lengths, digests, tokenizer_digest, counts.skipped)
    request = request | {"chat_template_sha256": template if counts.chats else None}
    for other in others:
        other.clear()
        for split in SPLITS:
            if contexts[split].contexts:
                shutil.copytree(first.root / split, other.root / split)
        write_whole(other.root / "tokenizer.json", (first.root / "tokenizer.json").read_bytes())
    for writer in lacking:
        writer.finish_text(request, text)


def _refuse_other_text(writers: list[StoreWriter]) -> None:
    """One pass reads one text: a data set may have changed since some of the stores had theirs."""
    first, *others = writers
    for other in others:
        if other.text.contexts_sha256 != first.text.contexts_sha256:
            raise InputError(
                f"{other.where}: holds another text than {first.where}, as the data set has changed between the two; "
                "harvest the layers that were begun first, one by one, or remove them"
            )


def _tell_of_text(data: Data, packed: Packed, strings: SpecialStrings, counts: RowCounts) -> None:
    """Print what the text pass left out, and what may not be as it was meant."""
    files = found_files(data)
    if len(files.read) > len(data.files) or files.left_out:
        others = f"; left out: {', '.join(map(str, files.left_out[:9]))}" if files.left_out else ""
        tqdm.write(
            f"text: {len(files.read)} files, {files.read[0]} to {files.read[-1]}{others}", file=sys.stderr
        )
    if packed.unused:
        tqdm.write(
            f"{packed.unused:,} of {packed.documents:,} documents are shorter than a context and were left out; "
            "data.pack concat joins them"
        )
    if counts.skipped:
        tqdm.write(
            f"bad rows that were skipped: {counts.skipped:,}; the first: {counts.first_skipped}",
            file=sys.stderr,
        )
    if strings.documents and data.special_tokens == "text":
        tqdm.write(
            f"{strings.documents:,} of {strings.read:,} documents hold the name of a special token (the first: "
            f"{strings.first}), which stays text; data.special_tokens parse makes it the token",
            file=sys.stderr,
        )


# -- model ---------------------------------------------------------------------------------------------


def _of_files(request: dict[str, Any], where: str, model: Model) -> dict[str, str | None]:
    """The digests of the model's files: as asked for; of a hub's name they are known once it was loaded."""
    if request["model_sha256"] is not None:
        return {key: request[key] for key in ("model_sha256", "description_sha256")}
    directory = lm.files_directory(where, model.revision)
    return {"model_sha256": directory_sha256(directory), "description_sha256": described_sha256(directory)}


def _of_model(model: lm.LanguageModel, special: Special, files: dict[str, str | None]) -> dict[str, Any]:
    """What all layers' `Source` have in common, beside what was asked for; `files`: the digests of the model's."""
    return {
        **files,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": model.weights_sha256(),
        "n_layers": model.n_layers,
        "d_in": model.d_model,
        "d_out": model.d_model,
        "bos_token_id": special.bos,
        "separator_token_id": special.separator,
        "dropped_token_ids": special.dropped,
        "shard_rows": SHARD_ROWS,
        "chunk_rows": CHUNK_ROWS,
        "offsets": True,
        "versions": _versions(),
    }


def _check_fit(
    settings: Settings, model: lm.LanguageModel, tokenizer: PreTrainedTokenizerFast, special: Special
) -> None:
    """Raise `InputError` when the model has no such positions, or no embedding of the tokens that it will be fed."""
    length, ids = settings.harvest.context_length, tokenizer.backend_tokenizer.get_vocab_size(False)
    if model.positions is not None and length > model.positions:
        raise InputError(
            f"harvest.context_length: {length} requested, but {model.name} has {model.positions} positions; lower it"
        )
    if (
        ids > model.tokens
    ):  # added tokens apart: a padding token without an embedding is common, and never fed
        raise InputError(
            f"model {model.name}: its tokenizer has {ids} tokens, but its embedding {model.tokens}; "
            "the tokenizer is another model's"
        )
    for token in (special.bos, special.separator):
        if token is not None and token >= model.tokens:
            raise _no_embedding(model.name, tokenizer, token, model.tokens)


def _no_embedding(name: str, tokenizer: PreTrainedTokenizerFast, token: int, known: int) -> InputError:
    """Of a token that was added to a tokenizer, where the embedding was not made larger."""
    word = tokenizer.backend_tokenizer.id_to_token(token)
    return InputError(
        f"model {name}: its embedding has {known} rows and none for token {token} ({word!r}), which was added to its "
        f"tokenizer; give it one (model.resize_token_embeddings({token + 1}) in transformers, then save_pretrained), "
        "or take the token out of the tokenizer"
    )


def _source(settings: Settings, model: lm.LanguageModel, layer: int, common: dict[str, Any]) -> Source:
    """What is harvested from `layer`; raises `InputError` when the model has no such layer or hook points."""
    lm.check_layers([layer], model.n_layers, model.name)
    input_hook, output_hook = hooks_of(layer, settings.harvest.input)
    model.check_hooks((input_hook, output_hook))
    gain = model.gain(layer)
    of_layer = {
        "layer": layer,
        "input_hook": input_hook,
        "output_hook": output_hook,
        "gain": gain.values.tolist(),
        "gain_bias": None if gain.bias is None else gain.bias.tolist(),
    }
    return Source.model_validate({**common, **of_layer})


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        name: version(name)
        for name in ("torch", "transformers", "transformer-lens", "numcodecs", "tokenizers")
    }


# -- room and summary ----------------------------------------------------------------------------------


def _refuse_if_it_cannot_fit(writers: list[StoreWriter], settings: Settings, force: bool) -> None:
    """Print the plan; called before the first window on an estimate, after it on what was measured."""
    plans = [plan_of(each, each.source.d_in + each.source.d_out, each.source.storage) for each in writers]
    for writer, plan in zip(writers, plans, strict=True):
        tqdm.write(f"plan: layer {writer.source.layer}: {plan}")
    if (missing := shortage(plans)) and not force:
        begun = " and ".join(writer.where for writer in writers if writer.has_rows)
        raise InputError(
            f"{settings.paths.activations}: the harvest {missing}; "
            f"{f'remove {begun} and ' if begun else ''}lower harvest.rows, move paths.activations, or give --force"
        )


def _summary(layer: int, writer: StoreWriter, manifest: Manifest) -> None:
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    costs = [m.cost for m in (train.inputs, train.outputs) if m]
    rows = rows_in_words({name: split.rows for name, split in manifest.splits.items()})
    tqdm.write(
        f"layer {layer}: {writer.where}, {rows}, "
        f"{human(writer.size())}, storing costs FVU {' / '.join(costs)} (inputs / outputs)",
        file=sys.stdout,
    )
    if heldout.rows == 0:
        tqdm.write(
            f"layer {layer}: NO held-out rows: no document that gave a context fell into harvest.heldout_fraction "
            f"{manifest.source.heldout_fraction:g}; raise it, or harvest more rows, or evaluate the train rows "
            "(--evaluate.split train)",
            file=sys.stderr,
        )
