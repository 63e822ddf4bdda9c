"""`lmdeploy lite auto_awq | auto_gptq | smooth_quant | calibrate`: write a smaller copy of a model, or what its activations look like."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from lmdeploy.cli.flags import FlagParser, add_config_flags, add_model_flag, config_from, truth
from lmdeploy.lite.options import AwqConfig, CalibrateConfig, GptqConfig, SmoothQuantConfig

if TYPE_CHECKING:
    from lmdeploy.lite.report import Report


def add_auto_awq_flags(parser: FlagParser) -> None:
    """Flags of `lite auto_awq`."""
    _add_flags(parser, AwqConfig)


def add_auto_gptq_flags(parser: FlagParser) -> None:
    """Flags of `lite auto_gptq`."""
    _add_flags(parser, GptqConfig)


def add_smooth_quant_flags(parser: FlagParser) -> None:
    """Flags of `lite smooth_quant`."""
    _add_flags(parser, SmoothQuantConfig)


def add_calibrate_flags(parser: FlagParser) -> None:
    """Flags of `lite calibrate`."""
    _add_flags(parser, CalibrateConfig)


def _add_flags(parser: FlagParser, config: type) -> None:
    add_model_flag(parser)
    add_config_flags(parser, config, title="Quantisation")
    compatible = parser.add_argument_group("Accepted for compatibility")
    compatible.add_argument("--trust-remote-code", nargs="?", const=True, type=truth, metavar="True|False", help="no remote code is ever run; only a notice")


def run_auto_awq(args: argparse.Namespace) -> int:
    """Quantise with AWQ and print the report."""
    with _orderly(args):
        from lmdeploy.lite.api import quantise_awq

        return _finish(quantise_awq(_model(args), config_from(args, AwqConfig), show=print))


def run_auto_gptq(args: argparse.Namespace) -> int:
    """Quantise with GPTQ and print the report."""
    with _orderly(args):
        from lmdeploy.lite.api import quantise_gptq

        return _finish(quantise_gptq(_model(args), config_from(args, GptqConfig), show=print))


def run_smooth_quant(args: argparse.Namespace) -> int:
    """Quantise weights and activations to 8 bits and print the report."""
    with _orderly(args):
        from lmdeploy.lite.api import quantise_smooth

        return _finish(quantise_smooth(_model(args), config_from(args, SmoothQuantConfig), show=print))


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure activations and print the modules with the loudest channels."""
    with _orderly(args):
        from lmdeploy.lite.api import calibrate_model

        config = config_from(args, CalibrateConfig)
        found = calibrate_model(_model(args), config, show=print)
    loudest = sorted(found["modules"].items(), key=lambda item: -item[1]["ratio"])[:8]
    print(f"written to {config.work_dir}; modules whose largest input channel stands out most:")
    for name, facts in loudest:
        print(f"  {name}: largest {facts['max']:.3g}, median of channels {facts['median']:.3g} ({facts['ratio']:.0f}x), channels {facts['loudest']}")
    return 0


def _model(args: argparse.Namespace) -> str | None:
    return getattr(args, "model_path", None)


@contextlib.contextmanager
def _orderly(args: argparse.Namespace) -> Iterator[None]:
    """Logging, the notice about remote code; and SIGTERM ends the command as Ctrl-C does: what is half-written goes."""
    from lmdeploy import log

    log.setup(getattr(args, "log_level", "WARNING"))
    if getattr(args, "trust_remote_code", False):
        log.get_logger(__name__).warning("--trust-remote-code has no effect: lmdeploy never runs code from a model folder")
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _finish(report: Report) -> int:
    from lmdeploy.lite.report import format_report

    print(format_report(report))
    return 0
