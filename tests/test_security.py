"""docs/security.md: every class of published holes is there, every promise names a test that exists, and the numbers are the code's."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
from lmdeploy.serving.page import BODIES
from lmdeploy.serving.service import MAX_FETCHING
from lmdeploy.vision.fetch import MAX_LOOK_UPS
from lmdeploy.vision.policy import MediaPolicy
from lmdeploy.vision.prompt import MAX_PICTURES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
#: of our own beside the published ones
ADDED = "| Web pages that a user visits"
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "`tests/" in line and not line.startswith(ADDED)]
TESTS = sorted(set(re.findall(r"`(tests/[\w/.]+)::(\w+)`", PAGE)))
PICKLES = re.compile(
    r"\b(?:import|from)\s+(?:pickle|cPickle|_pickle|cloudpickle|dill|marshal|shelve|joblib|jsonpickle)\b|allow_pickle\s*=\s*True|pickle\.loads?\("
)


def test_the_eleven_published_classes_are_rows_with_tests() -> None:
    assert len(ROWS) == 11
    assert len(TESTS) >= 25


@pytest.mark.parametrize("file, name", TESTS)
def test_the_test_that_a_row_names_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_the_published_list_has_no_class_that_the_page_lacks() -> None:
    published = ROOT.parent / "shared" / "reference" / "security.md"
    if not published.is_file():
        pytest.skip("shared/ is not beside the repository")
    section = published.read_text(encoding="utf-8").split("### 4.3")[0]
    assert len(re.findall(r"^\| \*\*", section, re.MULTILINE)) == len(ROWS)


def test_the_limits_are_those_of_the_code() -> None:
    policy = MediaPolicy()
    for value in (MAX_PICTURES, policy.max_bytes, policy.max_pixels, policy.max_redirects, MAX_FETCHING, MAX_LOOK_UPS):
        assert f"| {value:,} |" in PAGE, value
    assert f"| {policy.connect_seconds:g}, {policy.total_seconds:g} |" in PAGE


def test_the_server_never_encodes_a_prompt_without_its_media_policy() -> None:
    found = []
    for path in sorted((ROOT / "lmdeploy" / "serving").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        # called, or handed to partial or a thread
        calls = [(n, n.func if isinstance(n.func, ast.Attribute) else None, n.args) for n in nodes if isinstance(n, ast.Call)]
        for call, method, args in calls:
            names = [a for a in (method, *args) if isinstance(a, ast.Attribute) and a.attr in ("encode_prompt", "prepare") and _is_frontend(a.value)]
            found += [(path.name, any(k.arg == "media" and ast.unparse(k.value) == "self.media" for k in call.keywords)) for _ in names]
        assert not [n for n in nodes if isinstance(n, ast.Attribute) and n.attr == "own_files"] and "OWN" not in {getattr(n, "id", "") for n in nodes}
    assert len(found) == 3 and all(given for _, given in found), found


def _is_frontend(value: ast.expr) -> bool:
    return ast.unparse(value).endswith(("frontend", "prompts"))


@pytest.mark.parametrize("folder", ["lmdeploy", "benchmark", "scripts", "examples"])
def test_no_pickle_anywhere(folder: str) -> None:
    files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and (p.suffix == ".py" or p.suffix == "" and folder == "scripts")]
    assert files
    assert [str(p) for p in files if PICKLES.search(p.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("line", ["import pickle", "from cloudpickle import loads", "numpy.load(f, allow_pickle=True)", "x = pickle.loads(b)"])
def test_the_gate_against_pickle_sees_one(line: str) -> None:
    assert PICKLES.search(line)


def test_no_request_field_takes_a_tensor() -> None:
    """Schemas of all bodies: numbers come as numbers, nothing comes as raw memory."""
    words = re.compile(r"embeds|tensor|pickle|serialized|dtype|numpy|safetensors", re.IGNORECASE)
    for path, body in BODIES.items():
        assert words.findall(json.dumps(list(_fields(body.model_json_schema())))) == [], path


def _fields(schema: Any) -> Any:
    """Names of all fields of a schema, nested ones too."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for value in schema.values():
            yield from _fields(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _fields(value)


def test_code_beside_the_weights_is_not_run(model_folder: Path, tmp_path: Path) -> None:
    """A folder that asks for its own code everywhere where others would run it."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    written = tmp_path / "was_here"
    code = f"open({str(written)!r}, 'w').close()\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "sitecustomize.py", "conftest.py", "lmdeploy.py", "torch.py"):
        (folder / name).write_text(code)
    for name, keys in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ("AutoTokenizer",))):
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
        raw["auto_map"] = {key: f"{name.split('_')[0].removesuffix('.json')}_evil.Evil" for key in keys}
        (folder / name).write_text(json.dumps(raw))
    config = PytorchEngineConfig(cache_max_entry_count=20, max_batch_size=1)
    with pipeline(str(folder), backend_config=config, trust_remote_code=True) as pipe:
        assert pipe("Hi", gen_config=GenerationConfig(max_new_tokens=2)).generate_token_len  # type: ignore[union-attr]
    assert not written.exists()
