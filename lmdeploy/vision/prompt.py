"""Pictures in messages: parts become marks in the text, marks become tokens after the template was rendered.

A mark holds a number that is drawn for each request, so a user's text cannot name another picture. Pictures of a message stand before its text,
as the families were trained, unless the text says where by `<IMAGE_TOKEN>`.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

from lmdeploy.errors import RequestError
from lmdeploy.messages import Picture
from lmdeploy.vision.load import load_image
from lmdeploy.vision.picture import cut
from lmdeploy.vision.policy import MediaPolicy
from lmdeploy.vision.spec import VisionSpec

#: pictures of one request
MAX_PICTURES = 16
PLACE = "<IMAGE_TOKEN>"
#: type of a content part -> the key that holds the picture
PARTS = {"image_url": "image_url", "image_data": "image_data", "input_image": "image_url", "image": "image"}
#: where a picture stood in the request, for errors; other protocols' messages have other numbers than ours
AT = "at"
#: text around a picture's tokens and the token itself, where the vocabulary has it
CONTEXT = {"internvl": ("<img>", "<IMG_CONTEXT>", "</img>"), "llava": ("", "<image>", "")}

Message = dict[str, Any]
Encode = Callable[[str, bool], list[int]]  # text, whether BOS comes first


@dataclasses.dataclass(slots=True)
class Pictures:
    """The pictures of one request, in the order of their marks."""

    nonce: str
    found: list[Picture] = dataclasses.field(default_factory=list)

    def mark(self, number: int) -> str:
        """What stands for a picture in a text."""
        return f"\ue0f4{self.nonce}:{number}\ue0f5"

    def pattern(self) -> re.Pattern[str]:
        """Finds marks; the group is the number."""
        return re.compile(f"\ue0f4{self.nonce}:(\\d+)\ue0f5")


def has_pictures(messages: Any) -> bool:
    """Whether any message has a part that is a picture."""
    if not isinstance(messages, list):
        return False
    return any(
        isinstance(part, dict) and part.get("type") in PARTS
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def refuse_pictures(messages: Any) -> None:
    """Raise RequestError naming the first part that is a picture: the model reads text only."""
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("type") in PARTS:
                where = part.get(AT, f"messages.{i}.content.{number}")
                raise RequestError(f"{where}: this model reads text only, not {part['type']!r}", param=where, code="unsupported")


def take_pictures(messages: list[Message], spec: VisionSpec, policy: MediaPolicy) -> tuple[list[Message], Pictures]:
    """Messages whose contents are texts with marks, and the pictures. Raises RequestError for a picture that cannot be had."""
    pictures = Pictures(secrets.token_hex(8))
    out = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            message = {**message, "content": _content(content, f"messages.{i}.content", spec, policy, pictures)}
        out.append(message)
    return out, pictures


def _content(parts: list[Any], where: str, spec: VisionSpec, policy: MediaPolicy, pictures: Pictures) -> str:
    texts, marks = [], []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in PARTS:
            if len(pictures.found) >= MAX_PICTURES:
                raise RequestError(f"more than {MAX_PICTURES} pictures in one request; send fewer", param=where, code="too_many_images")
            marks.append(pictures.mark(len(pictures.found)))
            pictures.found.append(_picture(part.get(PARTS[kind]), part.get(AT, f"{where}.{number}"), spec, policy))
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise RequestError(f"{where}.{number}: a part is a text or a picture, not {str(kind)[:40]!r}", param=f"{where}.{number}", code="unsupported")
    text = "\n".join(texts)
    if text.count(PLACE) == len(marks) and marks:
        for mark in marks:
            text = text.replace(PLACE, mark, 1)
        return text
    return "".join(f"{mark}\n" for mark in marks) + text


def _picture(value: Any, where: str, spec: VisionSpec, policy: MediaPolicy) -> Picture:
    source = (value.get("url") or value.get("data")) if isinstance(value, dict) else value
    try:
        return cut(load_image(source, policy), spec)
    except RequestError as e:
        raise RequestError(f"{where}: {e}", param=where, code=e.code) from e


def expand(text: str, pictures: Pictures, spec: VisionSpec, encode: Encode, token_id: Callable[[str], int | None]) -> tuple[list[int], list[Picture]]:
    """Token ids of a rendered text with marks, and the pictures with their places. `token_id` knows the vocabulary's special tokens."""
    before, context, after = CONTEXT[spec.family]
    filler = token_id(context)
    pattern = pictures.pattern()
    order = [int(number) for number in pattern.findall(text)]
    if sorted(order) != list(range(len(pictures.found))):
        raise RequestError("the chat template drops or repeats a picture; send it in a user message", param="messages")
    found = [pictures.found[number] for number in order]
    if filler is None:
        return _between(pattern.split(text)[::2], found, encode)
    ids = encode(pattern.sub(lambda m: before + context * pictures.found[int(m[1])].count + after, text), True)
    places = [i for i, token in enumerate(ids) if token == filler]
    if len(places) != sum(p.count for p in found):
        raise RequestError(f"the text contains {context!r}, which stands for pictures; leave it out", param="messages")
    placed, used = [], 0
    for picture in found:
        placed.append(msgspec.structs.replace(picture, start=places[used]))
        used += picture.count
    return ids, placed


def _between(texts: list[str], found: list[Picture], encode: Encode) -> tuple[list[int], list[Picture]]:
    """Each text encoded alone, and token 0 for every token of a picture: its embedding is never looked at."""
    ids = encode(texts[0], True)
    placed = []
    for picture, text in zip(found, texts[1:], strict=True):
        placed.append(msgspec.structs.replace(picture, start=len(ids)))
        ids += [0] * picture.count
        ids += encode(text, False) if text else []
    return ids, placed
