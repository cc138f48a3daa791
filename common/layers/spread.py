"""Commands of layers in processes of their own, some at a time; what they print, with the layer's number before it."""

import os
import selectors
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

LOOK = 0.2
"""Seconds between looks at whether a process has ended: what it has started may keep its pipes open."""
FAILED = 2
"""Exit code of a stage whose user can mend what it says."""
INTERRUPTED = 130


class Child:
    """The process of one layer."""

    def __init__(self, layer: int, command: Sequence[str], place: int, places: int) -> None:
        self.layer, self.place, self._prefixed = layer, place, places > 1
        pipe = subprocess.PIPE if self._prefixed else None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "common.layers.child", *command],
            stdin=subprocess.PIPE,  # ends with this process, and ends the child
            stdout=pipe,
            stderr=pipe,
            env=os.environ | (own_share(place, places) if self._prefixed else {}),
            start_new_session=True,  # Ctrl-C comes here alone, and is passed on once
        )
        self._said: dict[int, bytes] = {}
        self._to: dict[int, TextIO] = {}
        for pipe, to in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._said[pipe.fileno()], self._to[pipe.fileno()] = b"", to

    @property
    def pipes(self) -> list[int]:
        return list(self._said)

    def tell(self, pipe: int, end: bool = False) -> bool:
        """Print the whole lines that have come, at the `end` the rest too; whether more may come."""
        more = True
        try:
            while data := os.read(pipe, 2**16):
                self._said[pipe] += data
            more = False
        except BlockingIOError:
            pass
        *lines, rest = self._said[pipe].split(b"\n")
        self._said[pipe] = b"" if end else rest
        to = self._to[pipe]
        for line in [*lines, *([rest] if end and rest else [])]:
            to.write(f"layer {self.layer} | {line.decode(errors='replace')}\n")
        to.flush()
        return more


def own_share(place: int, places: int) -> dict[str, str]:
    """Of the cores and GPUs, for the process at one of so many places."""
    import torch  # which the module's importers need not wait for

    from common.device import cores

    share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // places))}
    if n_gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
        share["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % n_gpus]
    return share


def each(commands: Mapping[int, Sequence[str]], places: int) -> list[int]:
    """Run every layer's command, `places` at a time; the layers that have failed with a line for their user.

    Whatever else ends one of them, and Ctrl-C, stops all, each with its state kept: raises `SystemExit` with its code,
    or `KeyboardInterrupt` where no single process has told the user already.
    """
    waiting, running, failed, code = list(commands.items()), list[Child](), list[int](), 0
    told = False
    selector = selectors.DefaultSelector()
    while waiting or running:
        try:
            while waiting and len(running) < places:
                free = next(place for place in range(places) if place not in {one.place for one in running})
                if places == 1:
                    layer, number = waiting[0][0], len(commands) - len(waiting) + 1
                    print(f"layer {layer} ({number} of {len(commands)})", flush=True)
                child = Child(*waiting.pop(0), free, places)
                running.append(child)
                for pipe in child.pipes:
                    selector.register(pipe, selectors.EVENT_READ, child)
            for key, _ in selector.select(LOOK):
                if not key.data.tell(key.fd):
                    selector.unregister(key.fd)
            for child in [one for one in running if one.process.poll() is not None]:
                running.remove(child)
                _tell_the_rest(child, selector)
                ended = child.process.returncode
                told = told or (ended == INTERRUPTED and places == 1)
                if ended == FAILED:
                    failed.append(child.layer)
                elif ended and not code:
                    code = ended if ended > 0 else 128 - ended
                    if code != INTERRUPTED:
                        print(
                            f"layer {child.layer} ended with code {ended}; the others are stopped, the same command "
                            "continues",
                            file=sys.stderr,
                        )
                    waiting.clear()
                    _stop(running)
        except KeyboardInterrupt:
            code = code or INTERRUPTED
            waiting.clear()
            _stop(running)
    if code == INTERRUPTED and not told:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)
    return sorted(failed)


def _stop(running: Sequence[Child]) -> None:
    for child in running:
        child.process.terminate()


def _tell_the_rest(child: Child, selector: selectors.BaseSelector) -> None:
    for pipe in child.pipes:
        child.tell(pipe, end=True)
        if pipe in selector.get_map():
            selector.unregister(pipe)
    for stream in (child.process.stdin, child.process.stdout, child.process.stderr):
        if stream is not None:
            stream.close()
