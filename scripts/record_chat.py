"""Make docs/chat.svg: type into a real `lmdeploy chat` in a pseudo-terminal and render what it really showed.

    python scripts/record_chat.py        (needs the test extra: pexpect)

Nothing is edited afterwards; run it again when the program's looks change. The picture shows the folder of the package: record in a
copy at a neutral place (`git archive HEAD | tar x -C /opt/lmdeploy`) and take its docs/chat.svg.
"""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import pexpect
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "double enter to end input >>> "
COLUMNS = 112
MESSAGES = ("Count from 1 to 20.", "My name is Ann.", "What is my name?", "Tell me a story about a fox and a king.")


def record() -> str:
    """Everything that the terminal was sent."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    child = pexpect.spawn(
        sys.executable, ["-m", "lmdeploy", "chat", "--seed", "3"], env=env, encoding="utf-8", timeout=120, dimensions=(60, COLUMNS), cwd=str(ROOT)
    )
    shown = []
    for message in MESSAGES:
        child.expect_exact(PROMPT)
        shown += [child.before, PROMPT]
        child.send(message + "\r\r")
    child.expect_exact(PROMPT)
    shown += [child.before, PROMPT]
    child.send("exit\r")
    child.expect(pexpect.EOF)
    return "".join(shown) + str(child.before)


def main() -> None:
    """Write the picture."""
    text = re.sub(r"\x1b\[\?[0-9;]*[a-z]|\x1b\[K", "", record()).replace("\r\n", "\n").replace("\r", "")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ lmdeploy chat", style="bold"))
    console.print(Text.from_ansi(text.rstrip()))
    console.save_svg(str(ROOT / "docs" / "chat.svg"), title="lmdeploy chat")


if __name__ == "__main__":
    main()
