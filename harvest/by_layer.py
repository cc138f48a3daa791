"""harvest.keep layer: harvest, train and evaluate a group of layers, remove their train rows, go on with the next.

Nothing is noted: what was done is read from the stores. One without train rows is done; a whole one is to be trained
and evaluated, and its rows then removed; any other is to be harvested. So the same command goes on after a kill at any
instant. The stages are processes of their own, which end with this one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.cli import Asked
from common.errors import InputError
from common.files import locked, size_of
from common.layers import spread
from common.processes import world
from common.settings import Settings
from harvest.plan import plans_of
from harvest.run import refuse_another, requested
from shards.manifest import read_manifest
from shards.plan import group, human, measured, room
from shards.remote import is_url
from shards.writer import StoreWriter

BEGUN, FINISHED = "settings.json", "transcoder.safetensors"
"""Of a run: its record from the start, its weights at the end (transcoder/weights.py, which is above)."""
OWN = ("--force", "--plan", "--refill")
"""Options of harvest that the other stages do not have."""


def local(path: str) -> Path:
    """A store's place on disk; raises `InputError` for an address."""
    if is_url(path):
        raise InputError(
            f"paths.activations: {path}: harvest.keep layer works in a directory; give one, or keep all"
        )
    return Path(path)


def by_layer(asked: Asked, settings: Settings) -> None:
    """Bring every layer asked for to its end; raises `InputError` naming those that failed."""
    if not settings.layers:
        raise InputError("layer: none given; for example LAYER=all (--layer all)")
    if world() > 1:
        raise InputError(
            "harvest.keep layer starts its stages itself, each in one process; leave NPROC out, or harvest a group of "
            "layers, train it and remove it yourself"
        )
    folder = local(settings.store_path(settings.layers[0])).parent
    with locked(folder / ".by_layer", f"{folder}: another harvest with harvest.keep layer is at work"):
        failed = _Set(asked, settings).work()
    if failed:
        raise InputError(
            f"{len(failed)} of {len(settings.layers)} layers failed "
            f"({'; '.join(f'{layer}: {why}' for layer, why in sorted(failed.items()))}), as said above; their rows are "
            "kept; the same command tries them again, and skips what is done"
        )


class _Set:
    def __init__(self, asked: Asked, settings: Settings) -> None:
        self.asked, self.settings = asked, settings
        self.writers = {layer: StoreWriter(local(settings.store_path(layer))) for layer in settings.layers}
        self.failed: dict[int, str] = {}
        """Layer -> stage."""

    def work(self) -> dict[int, str]:
        """The failed layers and the stages in which they did."""
        self._refuse_others()
        again = self._look_at_removed()
        self._check_fit(again)
        while True:
            self._finish([layer for layer in self._left() if self._whole(layer)])
            if not (chosen := self._next(again)):
                return self.failed
            self._harvest(chosen, again)
            again = [layer for layer in again if layer not in chosen]

    def _refuse_others(self) -> None:
        """Layers whose place has another harvest have failed: neither are its rows trained on nor removed."""
        request = requested(self.settings)  # where the text is not there, nothing is begun
        for layer, writer in self.writers.items():
            try:
                refuse_another(writer, layer, self.settings, request)
            except InputError as error:
                self._fail(layer, "harvest", error)

    def _fail(self, layer: int, stage: str, error: InputError) -> None:
        print(f"error: layer {layer}: {error}", file=sys.stderr, flush=True)
        self.failed[layer] = stage

    def _left(self) -> list[int]:
        return [layer for layer in self.writers if layer not in self.failed]

    def _whole(self, layer: int) -> bool:
        return self.writers[layer].complete and not self.writers[layer].removed

    def _look_at_removed(self) -> list[int]:
        """Layers whose rows were removed, but whose training is not what is asked for now: to be harvested again.

        Without --refill they have failed: the rows are not harvested again by mistake.
        """
        removed = [layer for layer in self._left() if self.writers[layer].removed]
        for layer in removed:
            self.writers[layer].remove_rows()  # what a killed removal has left
        layers = " ".join(map(str, removed))
        if not removed or _ended(self._command("train", removed)) == 0:
            for layer in removed:
                print(f"layer {layer}: trained as asked for, train rows removed: nothing to do", flush=True)
            return []
        print(f"layers {layers}: one of them is not trained as asked for", flush=True)
        other = self._each("train", removed)
        if self.asked.arguments.refill:
            return other
        self.failed |= dict.fromkeys(other, "train")
        return []

    def _plans(self, again: Sequence[int]) -> dict[int, int]:
        """Whole size of every store that is to be harvested, by a finished one's rows; what was begun comes first."""
        begun = [layer for layer in self._left() if not self.writers[layer].complete]
        todo = [*sorted(begun, key=lambda layer: not self.writers[layer].has_rows), *again]
        if not todo:
            return {}
        plans, _ = plans_of(self.settings.model_copy(update={"layers": tuple(todo)}), again)
        done = (measured(writer.root) for writer in self.writers.values() if writer.complete)
        if per_row := max((each for each in done if each is not None), default=None):
            plans = {
                layer: plan if plan.measured else replace(plan, bytes_per_row=per_row)
                for layer, plan in plans.items()
            }
        return {layer: plans[layer].bytes for layer in todo if layer in plans}

    def _room(self, beside: Sequence[int]) -> int:
        """What the stores of these layers may take: all others, finished or failed, stay as they are."""
        roots = {layer: writer.root for layer, writer in self.writers.items()}
        others = [root for layer, root in roots.items() if layer not in beside]
        return room(self.settings.harvest.disk_bytes, roots.values()) - sum(map(size_of, others))

    def _check_fit(self, again: Sequence[int]) -> None:
        """Raise `InputError`, before anything is begun, where not even one layer fits."""
        if self.asked.arguments.force or any(self._whole(layer) for layer in self._left()):
            return  # a whole store becomes small before there is a next pass
        sizes = self._plans(again)
        if sizes and not group(sizes, self._room([*sizes])):
            raise self._too_little(sizes)

    def _too_little(self, sizes: dict[int, int]) -> InputError:
        limit = "harvest.disk_bytes" if self.settings.harvest.disk_bytes else "the disk"
        layer = min(sizes, key=lambda each: sizes[each])
        return InputError(
            f"{self.settings.paths.activations}: layer {layer} takes {human(sizes[layer])}, and {limit} leaves "
            f"{human(max(0, self._room([*sizes])))} for it; lower harvest.rows, raise harvest.disk_bytes, move "
            "paths.activations, or give --force"
        )

    def _next(self, again: Sequence[int]) -> list[int]:
        """The layers of the next pass; those that do not fit beside what is kept of the others have failed."""
        if not (sizes := self._plans(again)):
            return []
        if chosen := group(sizes, self._room([*sizes])):
            return chosen
        if self.asked.arguments.force:
            return [next(iter(sizes))]
        print(f"error: {self._too_little(sizes)}", file=sys.stderr, flush=True)
        self.failed |= dict.fromkeys(sizes, "no room")
        return []

    def _harvest(self, layers: Sequence[int], again: Sequence[int]) -> None:
        print(f"harvest of layer {' '.join(map(str, sorted(layers)))}, in one pass of the model", flush=True)
        self._wait_for_the_dead(layers)
        _ended(self._command("harvest", layers))
        for layer in layers:
            writer = self.writers[layer]
            # One without train rows of which verify has un-committed a held-out window is done without them.
            if not writer.complete or (layer in again and writer.removed):
                self.failed[layer] = "harvest"

    def _finish(self, layers: Sequence[int]) -> None:
        """Train and evaluate whole stores, and remove their train rows."""
        for stage in ("train", "evaluate"):
            failed = self._each(stage, [layer for layer in layers if layer not in self.failed])
            self.failed |= dict.fromkeys(failed, stage)
        for layer in layers:
            if layer not in self.failed:
                runs = self._run_dir(layer).parent  # another of them may be reading these rows
                _wait_for(*runs.glob("*/.lock"), *runs.glob("*/.evaluation"))
                if other := _unfinished(runs, read_manifest(self.writers[layer].root).fingerprint):
                    self._fail(layer, "rows kept", other)
                    continue
                before = size_of(self.writers[layer].root)
                self.writers[layer].remove_rows()
                now = size_of(self.writers[layer].root)
                print(
                    f"layer {layer}: train rows removed, {human(before - now)}; {human(now)} stay", flush=True
                )

    def _each(self, stage: str, layers: Sequence[int]) -> list[int]:
        """The layers whose stage failed."""
        if not layers:
            return []
        print(f"{stage} of layer {' '.join(map(str, layers))}", flush=True)
        self._wait_for_the_dead(layers)
        return spread.each({layer: self._command(stage, [layer]) for layer in layers}, 1)

    def _run_dir(self, layer: int) -> Path:
        return self.asked.alone(layer, self.settings.run).run_dir()

    def _wait_for_the_dead(self, layers: Sequence[int]) -> None:
        """Until the stages of a driver that was killed, which end with it, have let go of what they were writing."""
        for layer in layers:
            run_dir = self._run_dir(layer)
            _wait_for(self.writers[layer].work / "lock", run_dir / ".lock", run_dir / ".evaluation")

    def _command(self, stage: str, layers: Sequence[int]) -> list[str]:
        """The stage with this command line, on these layers."""
        given = [word for word in sys.argv[1:] if stage == "harvest" or word not in OWN]
        one = [f"--layer={' '.join(map(str, layers))}", f"--run={self.settings.run}", "--harvest.keep=all"]
        return [stage, *given, *one, *(self._as_in_the_set(layers) if stage == "harvest" else [])]

    def _as_in_the_set(self, layers: Sequence[int]) -> list[str]:
        """A layer that is harvested alone has the set's settings all the same, not those of its recipe."""
        alone = self.asked.settings(tuple(layers)).harvest
        own = [(key, value) for key, value in self.settings.harvest if value != getattr(alone, key)]
        return [f"--harvest.{key}={value}" for key, value in own]


def _unfinished(runs: Path, fingerprint: str) -> InputError | None:
    """What to say of a run that was begun on the harvest with this fingerprint and needs its rows to its end."""
    for begun in sorted(runs.glob(f"*/{BEGUN}")):
        whole = (begun.parent / FINISHED).exists()
        if not whole and json.loads(begun.read_bytes()).get("harvest_fingerprint") == fingerprint:
            return InputError(
                f"{begun.parent}: begun on these train rows, and has not ended: they stay; train it to its end (make "
                f"train RUN={begun.parent.name}), or remove its directory"
            )
    return None


def _wait_for(*locks: Path) -> None:
    """Until nobody holds these locks; who does is told on standard error."""
    for lock in locks:
        if lock.exists():
            with locked(lock, None):
                pass


def _ended(command: Sequence[str]) -> int:
    """Exit code of a stage that has ended of itself, 0 or 2; any other, and Ctrl-C, end this process too.

    The stage says that it was interrupted.
    """
    child = spread.Child(0, command, 0, 1)
    try:
        code = child.process.wait()
    except KeyboardInterrupt:
        child.process.terminate()
        code = child.process.wait() or spread.INTERRUPTED  # it may have been at its end
    finally:
        if child.process.stdin:
            child.process.stdin.close()
    if code not in (0, spread.FAILED):
        raise SystemExit(code if code > 0 else 128 - code)
    return code
