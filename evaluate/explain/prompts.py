"""What is asked of the language model, and how its replies are read. Imports no torch.

Detection and fuzzing as in Paulo et al. 2024, arXiv:2410.13928; an explanation is judged by what it predicts, as in
Bills et al. 2023 (https://openaipublic.blob.core.windows.net/neuron-explainer/paper/index.html).
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from common.tokens import printable

Kind = Literal["explanation", "detection", "fuzzing"]
LEFT, RIGHT = "<<", ">>"
LEVELS = 10

EXPLAIN = """A latent of a sparse dictionary, trained on a language model's activations, fires on some tokens of a text
and is silent on all others. Below are {n} passages in which one latent fires, strongest first; they cover the
whole range of its activation. The tokens on which it fires stand between << and >>. Below each passage they are
listed with their strength, from 1 (weak) to 10 (the strongest anywhere).

{passages}

What do the marked tokens, or the text before them, have in common? Describe it so that somebody who has not seen
these passages can tell where the latent fires in other text. Be as specific as the passages allow and no more. Do
not mention the marks, the strengths or the latent. If you reason, do it first and briefly. The last line of your
answer must be

EXPLANATION: one sentence of at most 30 words"""

DETECT = """This describes the text on which a latent of a sparse dictionary fires:

{explanation}

Here are {n} passages. Any number of them, from none to all, may contain such text.

{passages}

For each passage in order: does it contain text that fits the description? Answer with a JSON list of {n} numbers
and nothing else: 1 for yes, 0 for no."""

FUZZ = """This describes the tokens on which a latent of a sparse dictionary fires, or the text that leads to them:

{explanation}

Here are {n} passages in which tokens are marked with << and >>. Any number of the passages, from none to all, may
be marked as described; in the others, other tokens are marked.

{passages}

For each passage in order: do the marked tokens fit the description? Answer with a JSON list of {n} numbers and
nothing else: 1 for yes, 0 for no."""


def plain(pieces: Sequence[str]) -> str:
    r"""A passage in one line. Text of its own that looks like a mark is spaced out.

    >>> plain(["cout", " <", "<", "\xa0x", "\n"])
    'cout < < x\\n'
    """
    return _spaced("".join(map(_in_line, pieces))).strip()


def marked(pieces: Sequence[str], marks: np.ndarray) -> str:
    """The same with << and >> around each run of the tokens of `marks` [m] bool; spaces stay outside.

    A token without text of its own, a part of a character, is marked with the token that completes it.

    >>> marked(["a", " b", "", " é", "c"], np.array([True, False, True, False, False]))
    '<<a>> b <<é>>c'
    """
    parts, inside, carried = list[str](), False, False
    for piece, mark in zip(pieces, marks.tolist(), strict=True):
        carried |= mark
        if not piece:
            continue
        text = _in_line(piece)
        if carried and not inside:
            text = re.sub(r"^ *", rf"\g<0>{_BEGIN}", text)
        elif inside and not carried:
            text = _END + text
        inside, carried = carried, False
        parts.append(text)
    return _spaced("".join([*parts, _END * inside])).replace(_BEGIN, LEFT).replace(_END, RIGHT).strip()


def _in_line(piece: str) -> str:
    """Control characters as escapes, other spaces (no-break, ideographic) as a plain one."""
    return printable(re.sub(r"[^\S\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", piece))


_BEGIN, _END = "\ue000", "\ue001"
"""Stand for the marks until the text's own are spaced out: `printable` writes these characters as escapes."""


def _spaced(text: str) -> str:
    return re.sub(r"<(?=<)|>(?=>)", r"\g<0> ", text)


def strengths(pieces: Sequence[str], activations: np.ndarray, largest: float) -> str:
    """The tokens on which a latent fires, with their strength in LEVELS of its `largest` activation.

    >>> strengths([" a", " b", " c"], np.array([2.0, 0.0, 0.1]), 4.0)
    '" a": 5, " c": 1'
    """
    levels = [min(LEVELS, math.ceil(LEVELS * value / largest)) for value in activations.tolist()]
    told = [(piece, level) for piece, level in zip(pieces, levels, strict=True) if level > 0 and piece]
    return ", ".join(f"{json.dumps(_in_line(piece), ensure_ascii=False)}: {level}" for piece, level in told)


def explain_prompt(passages: Sequence[tuple[str, str]]) -> str:
    """Of (marked text, strengths) of each passage."""
    told = "\n\n".join(f"{n}: {text}\n{levels}" for n, (text, levels) in enumerate(passages, 1))
    return EXPLAIN.format(n=len(passages), passages=told)


def score_prompt(kind: Kind, explanation: str, texts: Sequence[str]) -> str:
    """Which of these passages fit the explanation; with marks for fuzzing."""
    told = "\n".join(f"{n}: {text}" for n, text in enumerate(texts, 1))
    template = DETECT if kind == "detection" else FUZZ
    return template.format(n=len(texts), explanation=explanation, passages=told)


def _answered(reply: str) -> str:
    """Without what a reasoning model thought before, where the server leaves that in the reply."""
    return reply.rpartition("</think>")[2]


def read_explanation(reply: str) -> str | None:
    """The text after the last EXPLANATION:, in one line; None where there is none."""
    found = re.findall(
        r"^[\W_]*explanation[\W_]*?:[*_\s]*(\S.*)$", _answered(reply), re.MULTILINE | re.IGNORECASE
    )
    text = printable(" ".join(found[-1].split())).strip("*_ ") if found else ""
    return text or None


def read_verdicts(reply: str, n: int) -> list[bool] | None:
    """The last list of 0 and 1 in a reply; None where there is none, or not of `n`.

    >>> read_verdicts("[1, 0, 1]", 3), read_verdicts("[true, false]", 2), read_verdicts("[1, 0]", 3)
    ([True, False, True], [True, False], None)
    """
    lists = re.findall(r"\[([^\[\]]*)\]", _answered(reply))
    values = [each.strip().lower().strip("\"'") for each in lists[-1].split(",")] if lists else []
    words = {"1": True, "0": False, "true": True, "false": False}
    if len(values) != n or not all(each in words for each in values):
        return None
    return [words[each] for each in values]
