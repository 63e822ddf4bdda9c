"""`from lmdeploy import ...`: the names are complete, lazy, and do not depend on the order of imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lmdeploy

SURFACE = {
    "pipeline", "Pipeline", "client", "serve", "Tokenizer", "GenerationConfig", "TurbomindEngineConfig", "PytorchEngineConfig",
    "ChatTemplateConfig", "VisionConfig", "Response", "__version__", "version_info",
}  # fmt: skip


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_export_list_is_the_public_surface_and_sorted() -> None:
    assert set(lmdeploy.__all__) == SURFACE
    assert lmdeploy.__all__ == sorted(lmdeploy.__all__)
    assert set(lmdeploy.__all__) <= set(dir(lmdeploy))


@pytest.mark.parametrize("name", sorted(SURFACE))
def test_every_public_name_loads(name: str) -> None:
    assert getattr(lmdeploy, name) is not None


def test_unknown_name_raises_attribute_error_naming_it() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        lmdeploy.no_such_name  # noqa: B018


def test_importing_the_package_and_the_command_line_imports_neither_torch_nor_fastapi() -> None:
    code = "import sys, lmdeploy, lmdeploy.cli.main, lmdeploy.cli.flags, lmdeploy.config; print([m for m in ('torch', 'fastapi', 'numpy') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_pipeline_stays_the_function_after_the_module_of_that_name_was_imported() -> None:
    code = (
        "from lmdeploy.pipeline import Pipeline; import lmdeploy; from lmdeploy import pipeline; print(type(pipeline).__name__, lmdeploy.Pipeline is Pipeline)"
    )
    assert run_python(code) == "function True"


def test_pipeline_stays_the_function_when_the_name_came_first() -> None:
    code = "from lmdeploy import pipeline as p; import lmdeploy.pipeline; from lmdeploy import pipeline; print(p is pipeline, type(p).__name__)"
    assert run_python(code) == "True function"


def test_version_is_told_as_text_and_numbers() -> None:
    assert lmdeploy.__version__ == ".".join(map(str, lmdeploy.version_info))
