"""Whether the tokenizer and the weights of a folder belong together: checked once at the start, because no request could be answered if not."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lmdeploy.errors import CheckpointError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.spec import ModelSpec
from lmdeploy.text.chat_template import ChatTemplate
from lmdeploy.text.tokenizer import Tokenizer

logger = get_logger(__name__)


def check_fit(folder: Path, tokenizer: Tokenizer, template: ChatTemplate, spec: ModelSpec) -> None:
    """An id that every conversation needs and the model lacks raises CheckpointError; an end that it can never produce is a warning.

    A tokenizer may know more ids than the model (padding tokens that were added later); prompts that use them are refused one by one.
    """
    needed: list[int] = []
    with contextlib.suppress(RequestError):  # a template may refuse these messages; those that it takes are checked one by one
        needed = tokenizer.encode(template.render([{"role": "user", "content": ""}]), add_bos=True)
    if needed and max(needed) >= spec.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer writes a conversation with token id {max(needed)}, but config.json and weights have {spec.vocab_size} tokens; "
            "tokenizer and weights are of different models"
        )
    if beyond := sorted(i for i in spec.eos_token_ids if not 0 <= i < spec.vocab_size):
        logger.warning("%s: eos_token_id %s is not among the model's %d tokens and will never end an answer", folder, beyond, spec.vocab_size)
