"""`PromptEncoder`: a prompt in any of its forms -> token ids, and the pictures that some of them stand for. Knows the vocabulary, no engine."""

from __future__ import annotations

from typing import Any

from lmdeploy.errors import RequestError
from lmdeploy.messages import Picture
from lmdeploy.text.chat_template import ChatTemplate
from lmdeploy.text.tokenizer import Tokenizer
from lmdeploy.vision.policy import MEDIA_REFUSED, MediaPolicy
from lmdeploy.vision.prompt import expand, has_pictures, refuse_pictures, take_pictures
from lmdeploy.vision.spec import VisionSpec

Prompt = str | list[int] | list[dict[str, Any]]

#: texts shorter than this are simply tokenised; longer ones are first checked against the longest token of the vocabulary
_LONG_TEXT = 1 << 16


class PromptEncoder:
    """Template, tokenizer and limits of one model; `vision` is None for a model that reads text only."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, vision: VisionSpec | None, *, vocab_size: int, session_len: int) -> None:
        self.tokenizer, self.template, self.vision = tokenizer, template, vision
        self.vocab_size, self.session_len = vocab_size, session_len
        self._longest_token: int | None = None

    def encode(
        self,
        prompt: Prompt,
        *,
        media: MediaPolicy | None,
        do_preprocess: bool = True,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        any_length: bool = False,
    ) -> tuple[list[int], list[Picture]]:
        """Token ids and pictures; the template applies unless `do_preprocess` is False or ids are given.

        `media`: where pictures may come from, None = the caller takes none. `any_length`: to count tokens, not to compute them.
        """
        if not isinstance(prompt, (str, list)) or not len(prompt):
            problem = "empty" if isinstance(prompt, (str, list)) else f"of type {type(prompt).__name__}"
            raise RequestError(f"the prompt is {problem}; give text, a list of messages or token ids", param="prompt")
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return self.checked_ids(prompt), []
        if isinstance(prompt, str):
            text = self.template.render([{"role": "user", "content": prompt}], guard_special=True) if do_preprocess else prompt
            return self._tokens(text, any_length), []
        if not do_preprocess:
            raise RequestError("do_preprocess=False needs a text or token ids, not messages", param="messages")
        messages: Any = prompt
        pictures = None
        if self.vision is None:
            refuse_pictures(messages)
        elif has_pictures(messages):
            if media is None:
                raise RequestError("pictures are not taken here", param="messages", code=MEDIA_REFUSED)
            messages, pictures = take_pictures(messages, self.vision, media)
        # guard: special tokens that users and tools write stay text, so that they cannot forge turns
        text = self.template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs, guard_special=True)
        if pictures is None or self.vision is None:
            return self._tokens(text, any_length), []
        if not any_length:
            self._refuse_hopeless(text)
        ids, placed = expand(text, pictures, self.vision, lambda part, bos: self.tokenizer.encode(part, add_bos=bos), self.tokenizer.added_token_id)
        return self._in_vocabulary(ids), placed

    def checked_ids(self, ids: list[Any]) -> list[int]:
        """A copy of token ids that all exist."""
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < self.vocab_size:
            return list(ids)
        for position, token in enumerate(ids):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise RequestError(f"token id {token!r} at position {position} is not in [0, {self.vocab_size - 1}]", param="input_ids")
        return list(ids)

    def _tokens(self, text: str, any_length: bool) -> list[int]:
        if not any_length:
            self._refuse_hopeless(text)
        return self._in_vocabulary(self.tokenizer.encode(text, add_bos=True))

    def _in_vocabulary(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.vocab_size:
            token = max(ids)
            raise RequestError(
                f"the prompt contains {self.tokenizer.token_text(token)!r}: that is token id {token}, but the model has {self.vocab_size} tokens",
                param="prompt",
            )
        return ids

    def _refuse_hopeless(self, text: str) -> None:
        """Refuse a text that cannot fit whatever its tokens are, before spending seconds on tokenising it."""
        if len(text) < _LONG_TEXT:
            return
        if self._longest_token is None:
            self._longest_token = max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))
        least = len(text.encode("utf-8", "replace")) // max(self._longest_token, 1)
        if least >= self.session_len:
            raise RequestError(
                f"the prompt has {len(text)} characters, at least {least} tokens, but the context length (session_len) is {self.session_len}; shorten it",
                param="messages",
                code="context_length_exceeded",
            )


def too_long(ids: list[int], pictures: list[Picture], session_len: int, pool: int) -> RequestError:
    """The error of a prompt that leaves no room for an answer; `pool`: tokens that the whole KV cache holds."""
    seen = ""
    if pictures:
        each = ", ".join(f"{p.original[0]}x{p.original[1]}: {p.count}" for p in pictures)
        seen = f", {sum(p.count for p in pictures)} of them for {len(pictures)} picture{'s' if len(pictures) > 1 else ''} ({each})"
    is_long, larger = f"(session_len) is {session_len}", f"session_len >= {len(ids) + 1}"
    if pool < session_len:
        is_long, larger = f"is {pool}, all that the KV cache holds (session_len={session_len}),", "a larger cache_max_entry_count"
    smaller = "send smaller or fewer pictures, shorten the prompt" if pictures else "shorten the prompt"
    return RequestError(
        f"the prompt has {len(ids)} tokens{seen}, but the context length {is_long} and an answer needs at least 1; {smaller} or start with {larger}",
        param="messages",
        code="context_length_exceeded",
    )
