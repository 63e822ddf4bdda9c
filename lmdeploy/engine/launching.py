"""Starts the engine's process. Imports next to nothing: a server does this first of all, and everything else while the child imports torch."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lmdeploy.engine import wire

#: open files for which a process has room from the start; the usual limit
FILES = 1024


@dataclass(frozen=True, slots=True)
class Launched:
    """A child that was started, and our end of the pair."""

    process: subprocess.Popen[bytes]
    channel: wire.Channel[wire.ToParent]

    def end(self) -> None:
        """Kill it, at any point of its life, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.channel.close()


def launch(device_type: str = "auto") -> Launched:
    """Start a child; it makes ready for a device of that type and waits for `wire.Start`."""
    ours, theirs = socket.socketpair()
    try:
        command = [*child_command(), "--fd", str(theirs.fileno()), "--device", device_type]
        child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Launched(child, wire.to_child(ours))


def child_command() -> list[str]:
    """The program of the child: it imports the same package as we do, and nothing from the current folder.

    Hundreds of modules make many objects and no garbage: without looking for any meanwhile, imports take a fifth less. `child.main` turns it on again.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = f"r = {root!r}; sys.path[:1] = [] if r in sys.path[1:] else [r]"
    return [sys.executable, "-c", f"import gc, sys; gc.disable(); {path}; from lmdeploy.engine.child import main; main()"]


def widen_file_table(file: int) -> None:
    """Make room for FILES open files; call it before there are threads. `file` is any that is open.

    With threads, the kernel lets the `open` that widens the table wait until all processors have passed a point of rest: 10 ms with 2 of them, and two times
    0.35 s in the start of an engine with 16, at the 64th and the 128th file (CUDA opens many).
    """
    with contextlib.suppress(OSError):  # a lower limit
        os.close(os.dup2(file, FILES - 1))
