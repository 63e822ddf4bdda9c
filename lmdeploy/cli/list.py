"""`lmdeploy list`: the names that `--chat-template` knows, one a line."""

from __future__ import annotations

import argparse


def add_list_flags(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def run_list(args: argparse.Namespace) -> int:
    """Print the names, sorted."""
    from lmdeploy.text.chat_template import list_templates

    print("\n".join(sorted(list_templates())))
    return 0
