"""The `lmdeploy` command: a table of commands, one clear line for every mistake.

A command's module is imported when the command is called, so `lmdeploy --help` imports neither torch nor fastapi and
answers at once. Exit codes: 0 done, 1 our own fault (run again with --debug), 2 the user's, 3 it does not fit (`plan`), 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from lmdeploy.errors import ConfigError, LmdeployError
from lmdeploy.version import __version__


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table. `module` has `add_<name>_flags(parser)` and `run_<name>(args) -> exit code`."""

    words: str
    module: str
    help: str

    @property
    def name(self) -> str:
        """The last word, as in the names of the module's functions."""
        return self.words.split()[-1]


COMMANDS = (
    Command("chat", "lmdeploy.cli.chat", "talk with a model in the terminal"),
    Command("serve api_server", "lmdeploy.cli.serve", "serve a model over HTTP (OpenAI-style API)"),
    Command("serve api_client", "lmdeploy.cli.api_client", "talk with a model that api_server serves"),
    Command("serve gradio", "lmdeploy.cli.ui", "chat with a model, or with a server's, in a browser"),
    Command("plan", "lmdeploy.cli.plan", "what a model takes, what fits and how fast, before anything is loaded"),
    Command("lite auto_awq", "lmdeploy.cli.lite", "write a 4-bit copy of a model (AWQ)"),
    Command("lite auto_gptq", "lmdeploy.cli.lite", "write a 4-bit copy of a model (GPTQ)"),
    Command("lite smooth_quant", "lmdeploy.cli.lite", "write a copy of a model with 8-bit weights and activations"),
    Command("lite calibrate", "lmdeploy.cli.lite", "write what a model's activations look like"),
    Command("lite compare", "lmdeploy.cli.compare", "compare models and KV cache policies: quality, memory, speed"),
    Command("list", "lmdeploy.cli.list", "print the names of the built-in chat templates"),
    Command("check_env", "lmdeploy.cli.check_env", "print versions, hardware and the kernels that would be used"),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    _open_missing_streams()
    _never_fail_on_output()
    _let_idle_threads_sleep()
    try:
        return _run(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `lmdeploy list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LmdeployError as e:
        return _complain(f"error: {e}", 2, debug)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            return _complain(f"error: the output cannot be written: {e.strerror}; free some space", 2, debug)
        return _complain(_internal(e, debug), 1, debug)
    except Exception as e:
        return _complain(_internal(e, debug), 1, debug)


def _internal(e: Exception, debug: bool) -> str:
    hint = "" if debug else " (--debug shows where)"
    return f"internal error: {type(e).__name__}: {e}{hint}"


def _let_idle_threads_sleep() -> None:
    """Threads of the CPU kernels that wait for work spin some 20 us, then sleep (libgomp would spin for milliseconds; it reads this when torch is loaded).

    Beside one busy program a batch of 16 then makes 3,050 tokens/s instead of 640 (embedded model, 2 cores); never spinning (OMP_WAIT_POLICY=passive)
    makes 3,800 but costs a large model 11 % on an idle machine, where this costs nothing (benchmark/RESULTS.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _complain(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    print(f"lmdeploy: {' '.join(text.split())}", file=sys.stderr)
    return code


def _open_missing_streams() -> None:
    """Python has no stream at all where the caller closed it (`<&-`, some service managers); nothing to read and nowhere to write is what it means."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  # for the process's life
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _never_fail_on_output() -> None:
    """A terminal that cannot show a character shows '?' instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _run(words: list[str]) -> int:
    while words and words[0] == "--debug":
        words = words[1:]
    if not words or words[0] in ("-h", "--help"):
        print(help_text(COMMANDS))
        return 0
    if words[0] in ("-v", "--version"):
        print(f"lmdeploy {__version__}")
        return 0
    command, rest = find_command(words)
    if command is None:
        print(help_text(tuple(c for c in COMMANDS if c.words.startswith(words[0] + " "))))
        return 0
    return run_command(command, rest)


def find_command(words: list[str]) -> tuple[Command | None, list[str]]:
    """The command that the words name and what follows it; None for a group alone ('serve') or its --help."""
    for command in COMMANDS:
        parts = command.words.split()
        if words[: len(parts)] == parts:
            return command, words[len(parts) :]
    groups = {c.words.split()[0] for c in COMMANDS if " " in c.words}
    if words[0] in groups:
        if len(words) == 1 or words[1] in ("-h", "--help"):
            return None, []
        raise _unknown(" ".join(words[:2]))
    raise _unknown(words[0])


def _unknown(words: str) -> ConfigError:
    names = [c.words for c in COMMANDS]
    near = difflib.get_close_matches(words, [*names, *dict.fromkeys(n.split()[0] for n in names)], 1) or [n for n in names if words in n.split()]
    hint = f"did you mean 'lmdeploy {near[0]}'?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"unknown command '{words}'; {hint}")


def run_command(command: Command, words: list[str]) -> int:
    """Import the command's module, read its flags, run it."""
    from lmdeploy.cli.flags import FlagParser, add_common_flags

    module: Any = importlib.import_module(command.module)
    parser = FlagParser(prog=f"lmdeploy {command.words}", description=command.help[0].upper() + command.help[1:] + ".")
    getattr(module, f"add_{command.name}_flags")(parser)
    add_common_flags(parser)
    args = parser.parse_args(words)
    return int(getattr(module, f"run_{command.name}")(args))


def help_text(commands: tuple[Command, ...]) -> str:
    """The table of commands."""
    width = max(len(c.words) for c in commands)
    rows = [f"  {c.words:<{width}}  {c.help}" for c in commands]
    return "\n".join(
        [
            "usage: lmdeploy [-h] [-v] COMMAND ...",
            "",
            "Run and serve large language models on CPU and CUDA.",
            "",
            *rows,
            "",
            "`lmdeploy COMMAND --help` lists a command's flags; `--debug` shows the trace of an error.",
        ]
    )
