"""The requests of a run: which are sent, what they cost, and what their replies say."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from common.errors import InputError
from common.progress import progress
from evaluate.explain.endpoint import Answer, Endpoint, ask_all
from evaluate.explain.prompts import Kind, read_explanation, read_verdicts, score_prompt
from evaluate.explain.records import LatentExplanation, Requests, ScoreMetrics
from evaluate.explain.replies import Replies, Reply, key_of
from evaluate.explain.scores import score_of
from evaluate.explain.tasks import Example, Task

SENTENCE, REASONED, VERDICT = 30, 150, 3
"""Tokens that are reckoned with: of an explanation, of the answer that holds it, of one verdict."""
JUDGED: tuple[Kind, ...] = ("detection", "fuzzing")


@dataclass(frozen=True)
class Request:
    """One prompt of a latent."""

    kind: Kind
    latent: int
    prompt: str
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class Cost:
    """What is asked: all of it, and what is left to be sent."""

    requests: int
    left: int
    """Of the requests."""
    tokens_in: int
    """Of what is left, counted by the store's tokenizer."""
    tokens_out: int


@dataclass
class Asked:
    """The tasks of a run, the endpoint they go to and the replies that there are."""

    tasks: Sequence[Task]
    endpoint: Endpoint
    replies: Replies
    sent: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    last_error: str = ""

    def cost(self, tokenizer: Tokenizer) -> Cost:
        """Before anything is sent. Prompts that wait for an explanation are counted with one of SENTENCE tokens."""
        left, tokens_in, tokens_out, total = 0, 0, 0, 0
        for task in self.tasks:
            explanation = self.explanation(task)
            ready = [self._explain(task), *self._scores(task, explanation or "")]
            total += len(ready)
            for request in ready:
                waits = request.kind != "explanation" and explanation is None
                if not waits and self._reply(request) is not None:
                    continue
                left += 1
                tokens_in += len(tokenizer.encode(request.prompt, add_special_tokens=False).ids)
                tokens_in += SENTENCE * waits
                tokens_out += VERDICT * len(request.examples) or REASONED
        return Cost(total, left, tokens_in, tokens_out)

    def explain(self, concurrency: int) -> None:
        """Ask for the explanations that are lacking. Raises `InputError` where no request was ever answered."""
        asked = [self._explain(task) for task in self.tasks]
        self._send(asked, concurrency, "explanations")
        if self.failed and not any(self._reply(each) is not None for each in asked):
            raise InputError(
                f"{self.endpoint.base_url}: none of {self.sent:,} requests was answered, the last one: "
                f"{self.last_error}; the same command asks again"
            )

    def score(self, concurrency: int) -> None:
        """Have the explanations judged, as far as they have not been."""
        told = ((task, self.explanation(task)) for task in self.tasks)
        asked = [each for task, text in told if text is not None for each in self._scores(task, text)]
        self._send(asked, concurrency, "scores")

    def explanation(self, task: Task) -> str | None:
        """What was said of a latent, if that can be read."""
        reply = self._reply(self._explain(task))
        return _explanation(reply) if reply is not None else None

    def result(self, task: Task) -> LatentExplanation:
        """A latent's explanation and scores."""
        explanation = self.explanation(task)
        scores: dict[str, ScoreMetrics] = {}
        if explanation is not None:
            requests = self._scores(task, explanation)
            scores = {kind: self._judged([r for r in requests if r.kind == kind]) for kind in JUDGED}
        both = [each.score for each in scores.values()]
        known = [each for each in both if each is not None]
        return LatentExplanation(
            latent=task.latent,
            group=task.group,
            firings=task.firings,
            shown=task.shown,
            explanation=explanation,
            score=sum(known) / len(known) if known and len(known) == len(both) else None,
            detection=scores.get("detection"),
            fuzzing=scores.get("fuzzing"),
        )

    def requests(self) -> Requests:
        """What came back, of all that these tasks ask."""
        answered = [(each, self._reply(each)) for each in self._all()]
        there = [(request, reply) for request, reply in answered if reply is not None]
        return Requests(
            sent=self.sent,
            kept=len(there) - (self.sent - self.failed.total()),
            failed=dict(self.failed),
            unreadable=dict(
                Counter(request.kind for request, reply in there if not _readable(request, reply))
            ),
            tokens_in=sum(reply.tokens_in or 0 for _, reply in there),
            tokens_out=sum(reply.tokens_out or 0 for _, reply in there),
        )

    def elsewhere(self) -> dict[str, int]:
        """How many of the answers that are there came from another endpoint."""
        counts = self.replies.endpoints(self._key(each) for each in self._all())
        return {address: n for address, n in counts.items() if address != self.endpoint.base_url}

    def _all(self) -> Iterator[Request]:
        for task in self.tasks:
            yield self._explain(task)
            if (explanation := self.explanation(task)) is not None:
                yield from self._scores(task, explanation)

    def _explain(self, task: Task) -> Request:
        return Request("explanation", task.latent, task.prompt)

    def _scores(self, task: Task, explanation: str) -> list[Request]:
        batches: dict[Kind, list[list[Example]]] = {"detection": task.detection, "fuzzing": task.fuzzing}
        return [
            Request(kind, task.latent, score_prompt(kind, explanation, [each.text for each in batch]), batch)
            for kind, some in batches.items()
            for batch in some
        ]

    def _judged(self, requests: Sequence[Request]) -> ScoreMetrics:
        pairs: list[tuple[bool, bool]] = []
        without = 0
        for request in requests:
            reply = self._reply(request)
            said = read_verdicts(reply.reply or "", len(request.examples)) if reply is not None else None
            if said is None:
                without += len(request.examples)
            else:
                pairs += zip((each.true for each in request.examples), said, strict=True)
        return score_of(pairs, without)

    def _key(self, request: Request) -> str:
        own = self.endpoint
        return key_of(own.model, request.prompt, own.temperature, own.max_tokens)

    def _reply(self, request: Request) -> Reply | None:
        return self.replies[self._key(request)]

    def _send(self, requests: Sequence[Request], concurrency: int, what: str) -> None:
        lacking = [each for each in requests if self._reply(each) is None]
        if not lacking:
            return
        with progress(what, len(requests), "requests", initial=len(requests) - len(lacking)) as bar:

            def take(number: int, answer: Answer) -> None:
                self.replies.add(self._line(lacking[number], answer))
                self.sent += 1
                if answer.error is not None:
                    self.last_error = answer.error
                    self.failed[answer.error.partition(":")[0]] += 1
                bar.update(1)

            known = self.replies.answered(self.endpoint.base_url)
            ask_all(self.endpoint, [each.prompt for each in lacking], concurrency, take, known)

    def _line(self, request: Request, answer: Answer) -> Reply:
        return Reply(
            key=self._key(request),
            kind=request.kind,
            latent=request.latent,
            prompt=request.prompt,
            truth=tuple(each.true for each in request.examples),
            passages=tuple(each.what for each in request.examples),
            reply=answer.text,
            error=answer.error,
            finish=answer.finish,
            tokens_in=answer.tokens_in,
            tokens_out=answer.tokens_out,
            endpoint=self.endpoint.base_url,
        )


def _explanation(reply: Reply) -> str | None:
    """None also where the answer was cut off: its last line is the explanation."""
    return read_explanation(reply.reply or "") if reply.finish != "length" else None


def _readable(request: Request, reply: Reply) -> bool:
    if request.kind == "explanation":
        return _explanation(reply) is not None
    return read_verdicts(reply.reply or "", len(request.examples)) is not None
