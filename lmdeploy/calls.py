"""What a call of the Python API may be given, in all its historical forms, brought into one: prompts, options, turns, ids.

Whatever was never one of these forms raises RequestError naming argument and value; nothing is silently ignored.
"""

from __future__ import annotations

from typing import Any

from lmdeploy.config import GenerationConfig
from lmdeploy.errors import RequestError
from lmdeploy.log import get_logger
from lmdeploy.prompts import Prompt

logger = get_logger(__name__)

Prompts = str | list[str] | list[dict[str, Any]] | list[list[dict[str, Any]]] | list[int] | list[list[int]]
GenConfigs = GenerationConfig | list[GenerationConfig] | None

#: keywords of a call before 0.6 -> fields of GenerationConfig, and the values that such a call sampled with
_OLD_CALL = {name: name for name in ("top_k", "top_p", "temperature", "repetition_penalty", "ignore_eos")} | {"request_output_len": "max_new_tokens"}
_OLD_VALUES = {"max_new_tokens": 512, "top_k": 40, "top_p": 0.8, "temperature": 0.8}


def as_config(gen_config: Any, do_preprocess: Any, old: dict[str, Any]) -> tuple[GenConfigs, bool]:
    """The GenerationConfig(s) of a call in any of its historical forms. Raises RequestError for what was never one of them."""
    if gen_config is None and isinstance(do_preprocess, (GenerationConfig, list)):  # (prompts, sessions, gen_config) of newer scripts
        gen_config, do_preprocess = do_preprocess, True
    if not isinstance(do_preprocess, bool):
        raise RequestError(f"do_preprocess must be True or False, not {do_preprocess!r:.80}; name the arguments", param="do_preprocess")
    if not old:
        return gen_config, do_preprocess
    for name in old:
        if name not in _OLD_CALL:
            raise RequestError(f"unknown argument {name!r}; options of the answer belong in gen_config=GenerationConfig(...)", param=name)
    if gen_config is not None:
        raise RequestError(f"{', '.join(old)} given beside gen_config; put them into it", param=next(iter(old)))
    logger.warning("%s: deprecated arguments; use gen_config=GenerationConfig(...)", ", ".join(old))
    return GenerationConfig(**{**_OLD_VALUES, **{_OLD_CALL[name]: value for name, value in old.items()}}), do_preprocess


def as_turn(prompt: Any) -> list[dict[str, Any]]:
    """The messages that one turn of a conversation adds."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt):
        return list(prompt)
    raise RequestError(f"a turn of a conversation is a text or a list of messages, not {prompt!r:.80}", param="prompt")


def as_batch(prompts: Any) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether a single one was given. Raises RequestError for anything that is not a prompt."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, tuple):
        return [as_messages(prompts)], True
    if not isinstance(prompts, list) or not prompts:
        raise RequestError(f"prompts must be a text, messages, token ids, or a non-empty list of these, not {prompts!r:.80}", param="prompts")
    first = prompts[0]
    kind = type(first)
    if not all(isinstance(p, kind) for p in prompts):
        raise RequestError("prompts of different kinds in one list; give texts, conversations or token ids, not a mix", param="prompts")
    if isinstance(first, (dict, int)):
        return [prompts], True
    if isinstance(first, (str, list)):
        return prompts, False
    if isinstance(first, tuple):
        return [as_messages(p) for p in prompts], False
    raise RequestError(f"a prompt must be a text, messages or token ids, not {kind.__name__}", param="prompts")


def as_messages(pair: tuple[Any, ...]) -> list[dict[str, Any]]:
    """One user message of (text, image) or (text, [images]), in either order; an image is a PIL image, a path or a URL."""
    if len(pair) != 2 or not any(isinstance(part, str) for part in pair):
        raise RequestError(f"a prompt with pictures is (text, image) or (text, [images]), not {pair!r:.80}", param="prompts")
    text, images = pair if isinstance(pair[0], str) else (pair[1], pair[0])
    if not isinstance(images, (list, tuple)):
        images = [images]
    return [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]}]


def id_batch(input_ids: Any) -> list[list[int]]:
    """Token ids of one or many sequences, given as lists or a tensor, as a list of lists."""
    if hasattr(input_ids, "tolist"):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, list) or not input_ids:
        raise RequestError("input_ids must be a non-empty list of token ids, or a list of such lists", param="input_ids")
    batch = [input_ids] if isinstance(input_ids[0], int) else input_ids
    for ids in batch:
        if not isinstance(ids, list):
            raise RequestError(f"input_ids must hold token ids or lists of them, not {ids!r:.80}", param="input_ids")
    return batch
