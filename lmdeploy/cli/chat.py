"""`lmdeploy chat`: load a model into this process, say what it takes, and talk.

The conversation itself is `terminal.Conversation`; here are the flags, the start-up lines and the model as the one who answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from lmdeploy import log
from lmdeploy.cli.flags import add_config_flags, add_engine_flags, add_model_flag, add_template_flags, config_values, engine_config, template_config, truth
from lmdeploy.cli.startup import EMBEDDED, advised, describe
from lmdeploy.cli.terminal import Conversation, Message, open_reader, open_screen
from lmdeploy.config import ChatTemplateConfig, GenerationConfig
from lmdeploy.errors import ConfigError, RequestError
from lmdeploy.messages import Response

if TYPE_CHECKING:
    from lmdeploy.frontend import Frontend

#: what a conversation uses when no flag says otherwise
DEFAULTS = {"max_new_tokens": 1024, "top_k": 40, "top_p": 0.8, "temperature": 0.8}
_SAMPLING = ("max_new_tokens", "top_k", "top_p", "min_p", "temperature", "repetition_penalty", "stop_words", "ignore_eos")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the answers; shared with api_client."""
    group = add_config_flags(parser, GenerationConfig, title="Answers", only=_SAMPLING, defaults=DEFAULTS)
    group.add_argument("--seed", type=int, dest="random_seed", metavar="INT", help="same seed, same answers (default: a new one each time)")
    group.add_argument("--greedy", nargs="?", const=True, type=truth, metavar="True|False", help="always the likeliest token (default: False)")


def generation_config(args: argparse.Namespace) -> GenerationConfig:
    """The GenerationConfig of the flags, over the defaults of a conversation; a bad value is a mistake of the command line."""
    values = {**DEFAULTS, **config_values(args, GenerationConfig)}
    try:
        return GenerationConfig(**values, do_sample=not getattr(args, "greedy", False))
    except RequestError as e:
        raise ConfigError(str(e)) from e


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag of `lmdeploy chat`."""
    add_model_flag(parser)
    add_generation_flags(parser)
    add_engine_flags(parser)
    add_template_flags(parser).add_argument("--model-name", metavar="NAME", help="a built-in chat template's name (old spelling of --chat-template)")


def run_chat(args: argparse.Namespace) -> int:
    """Load, talk, free."""
    log.setup(getattr(args, "log_level", "WARNING"))
    generation = generation_config(args)
    config = engine_config(args)
    template = _template(args)
    screen = open_screen()
    reader = open_reader(screen)
    if args.model_path is None:
        screen.note(EMBEDDED)
    from lmdeploy.frontend import Frontend

    with advised(args.model_path, config):
        opened = Frontend.open(args.model_path, config, template)
    with opened as frontend:
        screen.note(describe(frontend, config))
        ask = LocalModel(frontend, generation, screen.note if "max_new_tokens" in args else None)
        Conversation(ask, reader, screen, session_len=frontend.info.session_len).run()
    return 0


def _template(args: argparse.Namespace) -> ChatTemplateConfig | None:
    """From the flags; like in the Python API, a --model-name that no template has is only a label."""
    name = getattr(args, "model_name", None)
    if name is None:
        return template_config(args)
    from lmdeploy.frontend import template_by_name

    named = template_by_name(name)
    return template_config(args, named.model_name if named else None)


class LocalModel:
    """Answers with the model of this process."""

    def __init__(self, frontend: Frontend, generation: GenerationConfig, notice: Callable[[str], None] | None) -> None:
        self._frontend, self._generation, self._notice = frontend, generation, notice
        self._rope_length = 0  # the first turn's length fixes a dynamic rope's base for the whole conversation

    def __call__(self, messages: list[Message]) -> Generator[Response, None, None]:
        """Increments of the answer to the last message."""
        rope_length = self._rope_length if len(messages) > 1 else 0
        prepared = self._frontend.prepare(messages, self._generation, rope_length=rope_length)
        self._rope_length = rope_length or len(prepared.token_ids)
        for text in prepared.notices:
            if self._notice is not None:
                self._notice(text)
        yield from self._frontend.stream(prepared)
