"""The table of limits in docs/operate.md says what the code does (tests/serving/test_limits.py: the code does what it says)."""

from __future__ import annotations

from tests.docs.limits import BEGIN, END, PAGE, table


def test_the_table_is_made_from_the_constants() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text.split(BEGIN)[1].split(END)[0].strip()
    assert shown == table().strip(), "run: python -m tests.docs.limits"


def test_every_option_of_the_table_exists() -> None:
    from lmdeploy.cli.flags import FlagParser
    from lmdeploy.cli.serve import add_api_server_flags

    parser = FlagParser("x", "x")
    add_api_server_flags(parser)
    options = {word.strip("`") for line in table().splitlines() for word in line.split() if word.startswith("`--")}
    assert len(options) >= 10
    assert options <= set(parser._option_string_actions)
