"""`lmdeploy lite auto_awq`: write a 4-bit copy of a model, and say what it cost."""

from __future__ import annotations

import argparse

from lmdeploy.cli.flags import FlagParser, add_config_flags, add_model_flag, config_from, truth
from lmdeploy.lite.options import AwqConfig


def add_auto_awq_flags(parser: FlagParser) -> None:
    """Flags of `lite auto_awq`."""
    add_model_flag(parser)
    add_config_flags(parser, AwqConfig, title="Quantisation")
    compatible = parser.add_argument_group("Accepted for compatibility")
    compatible.add_argument("--trust-remote-code", nargs="?", const=True, type=truth, metavar="True|False", help="no remote code is ever run; only a notice")


def run_auto_awq(args: argparse.Namespace) -> int:
    """Quantise and print the report."""
    from lmdeploy import log
    from lmdeploy.lite.api import quantise_awq
    from lmdeploy.lite.report import format_report

    log.setup(getattr(args, "log_level", "WARNING"))
    if getattr(args, "trust_remote_code", False):
        log.get_logger(__name__).warning("--trust-remote-code has no effect: lmdeploy never runs code from a model folder")
    config = config_from(args, AwqConfig)
    report = quantise_awq(getattr(args, "model_path", None), config, show=print)
    print(format_report(report))
    return 0
