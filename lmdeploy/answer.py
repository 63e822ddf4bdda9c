"""`Prepared`: a checked request. `Answer`: token ids of one answer become text increments, stop words included; `Merger` joins increments.

Knows no engine and no HTTP. Text is emitted as soon as it can no longer change: half a character and a possible beginning of a
stop word are held back. Token ids and log-probabilities are passed on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmdeploy.messages import EngineOutput, Picture, Response, SamplingParams, TokenLogprobs
from lmdeploy.text.detokenizer import IncrementalDetokenizer
from lmdeploy.text.stops import StopMatcher
from lmdeploy.text.tokenizer import Tokenizer

#: fields of an increment that tell how the whole answer stands
_STANDING = (
    "generate_token_len", "input_token_len", "cached_tokens", "finish_reason", "stop_reason", "session_id", "error_code", "error_message", "embedding",
)  # fmt: skip


class StopZones(Protocol):
    """Says where in one answer stop words count."""

    def split(self, text: str, *, last: bool = False) -> list[tuple[str, bool]]:
        """Pieces of the text so far, in order, and whether stop words count in them; what is not decided yet comes later, at the latest with `last`."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request, ready to submit (any number of times)."""

    token_ids: list[int]
    sampling: SamplingParams
    n: int
    stop_words: list[str]
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    include_stop: bool
    rope_length: int = 0
    cache_salt: str = ""
    owner: str = ""
    pictures: list[Picture] = field(default_factory=list)
    shown_special: frozenset[int] = frozenset()  # special tokens whose text is shown although skip_special_tokens
    stop_zones: Callable[[], StopZones] | None = None  # None: stop words count everywhere
    notices: list[str] = field(default_factory=list)  # what the caller should be told, e.g. a shortened max_new_tokens


class Answer:
    """Feed engine outputs, get `Response` increments; `finished` once the last one was given."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        stops: StopMatcher,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        include_stop: bool = False,
        min_new_tokens: int = 0,
        shown_special: frozenset[int] = frozenset(),
        zones: StopZones | None = None,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            prompt_ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            shown_special=shown_special,
        )
        self._stops, self._zones = stops, zones
        self._num_prompt, self._num_cached = len(prompt_ids), 0
        self._include_stop = include_stop
        self._min_new_tokens = min_new_tokens
        self.finished = False
        self._count = 0

    def feed(self, output: EngineOutput) -> Response | None:
        """The increment that `output` brings; None when there is nothing to tell yet."""
        ids, logprobs, logits, hidden = list(output.token_ids), output.logprobs, output.logits, output.last_hidden_state
        if output.stop_token_id is not None and not self._include_stop:  # the token goes, and with it the rows that chose it
            ids, logprobs, logits, hidden = ids[:-1], _but_last(logprobs), _but_last(logits), _but_last(hidden)
        self._num_cached = output.num_cached or self._num_cached  # said with the first token
        text, ids = self._read(ids)
        if self._stops.matched is None:
            self._count = max(self._count, output.num_generated)  # an engine that died does not know it any more
        finish, stop_reason = output.finish_reason, output.stop_token_id
        if finish is not None and self._stops.matched is None:
            text += self._until_stop(self._detokenizer.flush(), last=True) + self._stops.flush()
        if self._stops.matched is not None and finish != "error":
            finish, stop_reason = "stop", self._stops.matched  # type: ignore[assignment]
        self.finished = finish is not None
        if not (text or ids or self.finished or output.prompt_logprobs is not None):
            return None
        return Response(
            text=text,
            generate_token_len=self._count,
            input_token_len=output.num_prompt or self._num_prompt,
            finish_reason=finish,
            token_ids=ids,
            logprobs=None if logprobs is None else [as_dict(entry) for entry in logprobs],
            index=output.index,
            logits=logits,
            last_hidden_state=hidden,
            cached_tokens=self._num_cached,
            stop_reason=stop_reason,
            queue_seconds=output.queue_seconds,
            error_code=(output.error_code or "engine_error") if output.error else None,
            error_message=output.error,
            prompt_logprobs=None if output.prompt_logprobs is None else [None if e is None else as_dict(e) for e in output.prompt_logprobs],
            embedding=output.embedding,
        )

    def _read(self, ids: list[int]) -> tuple[str, list[int]]:
        """The text of new tokens, and which of them are the answer's: those behind the end of a stop word are not."""
        if self._zones is None and self._count + 1 >= self._min_new_tokens:
            before = (self._detokenizer.state, self._stops.state) if len(ids) > 1 else None
            text = self._stops.feed(self._detokenizer.feed(ids))
            if before is None or self._stops.matched is None:
                self._count += len(ids)
                return text, ids
            self._detokenizer.state, self._stops.state = before  # which token ended it?
        text, end = "", 0
        while end < len(ids) and self._stops.matched is None:
            # stop words that lie wholly within the first min_new_tokens do not count
            active = self._count + 1 >= self._min_new_tokens
            text += self._until_stop(self._detokenizer.feed(ids[end : end + 1]), active=active)
            end, self._count = end + 1, self._count + 1
        return text, ids[:end]

    def _until_stop(self, text: str, *, active: bool = True, last: bool = False) -> str:
        """What of the new text, and of what was held back, is sure to be part of the answer."""
        if self._zones is None:
            return self._stops.feed(text, active=active)
        pieces = self._zones.split(text, last=last)
        return "".join([self._stops.feed(piece, active=active) if counts else self._stops.skip(piece) for piece, counts in pieces])


def answers_to(prepared: Prepared, tokenizer: Tokenizer) -> dict[int, Answer]:
    """The n answers to a request, by their index; nothing was fed yet."""
    stops = StopMatcher(prepared.stop_words, prepared.include_stop)
    return {
        i: Answer(
            tokenizer,
            prepared.token_ids,
            stops.fresh(),
            skip_special_tokens=prepared.skip_special_tokens,
            spaces_between_special_tokens=prepared.spaces_between_special_tokens,
            include_stop=prepared.include_stop,
            min_new_tokens=prepared.sampling.min_new_tokens,
            shown_special=prepared.shown_special,
            zones=prepared.stop_zones() if prepared.stop_zones is not None else None,
        )
        for i in range(prepared.n)
    }


def _but_last(rows: Any) -> Any:
    return None if rows is None else rows[:-1]


def as_dict(entry: TokenLogprobs) -> dict[int, float]:
    """token id -> log p: the chosen token first, then the likeliest others, best first."""
    return {entry.token_id: entry.logprob, **dict(entry.top)}


def joined(increments: list[Response]) -> list[Response]:
    """Increments in the order they came, those of each answer as one; ones with tensors and errors stay alone. May change the first of each answer."""
    out: list[Response] = []
    open_answers: dict[int, Response] = {}
    for part in increments:
        whole = open_answers.get(part.index)
        if whole is None or part.finish_reason == "error" or part.logits is not None or part.last_hidden_state is not None:
            out.append(part)
            open_answers[part.index] = part
            continue
        whole.text += part.text
        whole.token_ids += part.token_ids
        if part.logprobs is not None:
            whole.logprobs = (whole.logprobs or []) + part.logprobs
        for name in _STANDING:
            setattr(whole, name, getattr(part, name))
    return out


class Merger:
    """Joins the increments of n answers into complete ones; each part is copied once, whatever the length."""

    def __init__(self, n: int) -> None:
        self.answers = [Response(text="", generate_token_len=0, input_token_len=0, index=i) for i in range(n)]
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._rows: list[dict[str, list[Any]]] = [{} for _ in range(n)]  # tensors, concatenated at the end

    def add(self, part: Response) -> None:
        """Append one increment to its answer."""
        whole = self.answers[part.index]
        self._texts[part.index].append(part.text)
        whole.token_ids += part.token_ids
        for name in ("logprobs", "prompt_logprobs"):
            self._extend(whole, name, getattr(part, name))
        for name in ("logits", "last_hidden_state"):
            rows = getattr(part, name)
            if rows is not None:
                self._rows[part.index].setdefault(name, []).append(rows)
        for name in _STANDING:
            setattr(whole, name, getattr(part, name))
        if part.finish_reason is not None:
            self._join(part.index)

    @staticmethod
    def _extend(whole: Response, name: str, entries: list[Any] | None) -> None:
        if entries is None:
            return
        if getattr(whole, name) is None:
            setattr(whole, name, [])
        getattr(whole, name).extend(entries)

    def _join(self, index: int) -> None:
        whole = self.answers[index]
        whole.text = "".join(self._texts[index])
        for name, rows in self._rows[index].items():
            setattr(whole, name, _concatenated(rows))
        self._texts[index], self._rows[index] = [whole.text], {}

    def complete(self) -> list[Response]:
        """The answers as far as they came; one that was cut short has finish_reason 'abort'."""
        for answer in self.answers:
            if answer.finish_reason is None:
                self._join(answer.index)
                answer.finish_reason = "abort"
        return self.answers


def _concatenated(rows: list[Any]) -> Any:
    import torch

    return torch.cat(rows)


def merge_increments(increments: Iterable[Response], n: int) -> list[Response]:
    """Complete answers from a stream of increments of one request."""
    merged = Merger(n)
    for response in increments:
        merged.add(response)
    return merged.answers
