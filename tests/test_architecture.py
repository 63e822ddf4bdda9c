"""The rules of docs/architecture.md and docs of style, kept by reading the source: no import goes up, no globals, no giants.

Everything is checked on the syntax tree, imports inside functions included. There are no exceptions: when a rule stands in
the way, the design is discussed, not the test.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lmdeploy"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
MODULES = [p for p in FILES if p.read_text(encoding="utf-8").strip()]

#: lowest first; parts on one line do not import each other
LAYERS = (
    ("errors", "log", "version", "kv_layer"),
    ("checked", "grammar"),
    ("config", "spec", "messages", "inputs", "parallel"),
    ("kernels", "checkpoint", "text", "vision"),
    ("formats",),
    ("layers",),
    ("models",),
    ("engine",),
    ("plan",),
    ("answer", "delivery", "prompts"),
    ("frontend",),
    ("calls",),
    ("pipeline", "vl"),
    ("lite",),
    ("serving",),
    ("cli",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
#: not part of the layers: the door itself
DOOR = {"__init__.py", "__main__.py"}
#: packages that may be missing, and so may be imported where they are used
OPTIONAL = {"PIL", "gradio", "opentelemetry", "ray", "readline", "triton"}
MAX_FILE, MAX_FUNCTION, MAX_LINE = 500, 60, 180


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: 'engine' for lmdeploy/engine/executor/local.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method."""
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without decorators, signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def names(path: Path) -> str:
    """How a test is called."""
    return str(path.relative_to(ROOT))


def each_module(check: Callable[[Path], None]) -> Callable[[], None]:
    """A rule for every file as one test (one for each rule and file would be thousands), which names all files that break it."""

    def rule() -> None:
        broken = {}
        for path in MODULES:
            try:
                check(path)
            except AssertionError as error:
                broken[names(path)] = str(error)
        assert not broken, "\n".join(f"{name}: {why}" for name, why in broken.items())

    rule.__doc__ = check.__doc__
    return rule


def broken_imports(path: Path, tree: ast.AST) -> list[str]:
    """Imports of the package's own parts that do not go down."""
    mine = part_of(path)
    bad = []
    for line, name in imports_of(tree):
        words = name.split(".")
        if words[0] != "lmdeploy":
            continue
        other = words[1] if len(words) > 1 else "__init__"
        if other == mine:
            continue
        if other not in LEVEL:
            bad.append(f"{names(path)}:{line} imports {name}, which belongs to no layer")
        elif LEVEL[other] >= LEVEL[mine]:
            bad.append(f"{names(path)}:{line} imports {name}, which is not below {mine}")
    return bad


def test_every_file_belongs_to_a_layer() -> None:
    assert {part_of(p) for p in FILES if names(p).removeprefix("lmdeploy/") not in DOOR} <= set(LEVEL)


@each_module
def test_imports_go_down_only(path: Path) -> None:
    if names(path).removeprefix("lmdeploy/") in DOOR:
        return  # the door loads every public name
    assert broken_imports(path, tree_of(path)) == []


def test_the_check_of_imports_sees_one_inside_a_function() -> None:
    tree = ast.parse("def f():\n    from lmdeploy.engine.engine import Engine\n")
    assert broken_imports(PACKAGE / "kernels" / "api.py", tree) == [
        "lmdeploy/kernels/api.py:2 imports lmdeploy.engine.engine.Engine, which is not below kernels"
    ]


def module_imports(path: Path) -> set[str]:
    """Own modules that a file imports when it is imported itself, those for type checkers only left out."""
    found: set[str] = set()
    for node in tree_of(path).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for _, name in imports_of(node):
                for end in range(1, name.count(".") + 2):
                    found.add(".".join(name.split(".")[:end]))
    return found


def test_no_import_cycle_between_modules() -> None:
    own = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    own.pop("lmdeploy")
    graph = {name: module_imports(path) & set(own) - {name} for name, path in own.items()}
    while leaves := [name for name, targets in graph.items() if not targets]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: targets - set(leaves) for name, targets in graph.items()}
    assert graph == {}


@each_module
def test_no_global_state_by_statement(path: Path) -> None:
    assert [f"line {n.lineno}" for n in ast.walk(tree_of(path)) if isinstance(n, ast.Global)] == []


@each_module
def test_environment_is_read_in_cli_and_log_only(path: Path) -> None:
    if part_of(path) in ("cli", "log"):
        return
    reads = [n.lineno for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv", "putenv", "environb")]
    reads += [line for line, name in imports_of(tree_of(path)) if name in ("os.environ", "os.getenv", "os.putenv", "os.environb")]
    assert reads == []


@each_module
def test_file_is_at_most_500_lines_of_at_most_180_characters(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE
    assert [i for i, line in enumerate(lines, 1) if len(line) > MAX_LINE] == []


@each_module
def test_function_is_at_most_60_lines(path: Path) -> None:
    assert [f"{f.name}: {code_lines(f)} lines" for f in functions_of(tree_of(path)) if code_lines(f) > MAX_FUNCTION] == []


@each_module
def test_module_says_why_it_exists(path: Path) -> None:
    text = ast.get_docstring(tree_of(path))
    assert text
    assert len(text.splitlines()) <= 20


@each_module
def test_arguments_and_results_are_typed(path: Path) -> None:
    bare = []
    for f in functions_of(tree_of(path)):
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if untyped or f.returns is None:
            bare.append(f"{f.name}: {untyped or 'result'}")
    assert bare == []


@each_module
def test_no_mutable_default(path: Path) -> None:
    kinds = (ast.List, ast.Dict, ast.Set)
    assert [f.name for f in functions_of(tree_of(path)) for d in [*f.args.defaults, *f.args.kw_defaults] if isinstance(d, kinds)] == []


def calls_of(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(last word of what is called, the call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@each_module
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    tree = tree_of(path)
    banned = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    assert [name for _, name in imports_of(tree) if name.split(".")[0] in banned] == []
    assert [name for name, _ in calls_of(tree) if name in ("eval", "exec", "compile") or name.endswith((".recv", "yaml.load")) and "conn" in name] == []


@each_module
def test_torch_load_reads_weights_only(path: Path) -> None:
    for name, call in calls_of(tree_of(path)):
        if name.endswith("torch.load") or name == "torch.load":
            safe = [k for k in call.keywords if k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True]
            assert safe, f"{names(path)}:{call.lineno}"


@each_module
def test_no_remote_code_and_no_shell(path: Path) -> None:
    for name, call in calls_of(tree_of(path)):
        keywords = {k.arg: k.value for k in call.keywords}
        for word in ("trust_remote_code", "shell"):
            value = keywords.get(word)
            assert value is None or (isinstance(value, ast.Constant) and value.value is False), f"{names(path)}:{call.lineno} {name}({word}=...)"
        assert name not in ("os.system", "os.popen"), f"{names(path)}:{call.lineno}"


@each_module
def test_print_is_for_the_command_line(path: Path) -> None:
    if part_of(path) == "cli":
        return
    assert [call.lineno for name, call in calls_of(tree_of(path)) if name == "print"] == []


@each_module
def test_only_optional_packages_are_imported_in_a_try(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Try) and any(
            "ImportError" in ast.unparse(h.type) or "ModuleNotFoundError" in ast.unparse(h.type) for h in node.handlers if h.type
        ):
            tried = {name.split(".")[0] for _, name in imports_of(ast.Module(body=node.body, type_ignores=[]))}
            assert tried <= OPTIONAL | {"lmdeploy"}


@each_module
def test_nothing_is_left_open(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"\b(?:TODO|FIXME|XXX)\b", text) == []
    abstract = sum(is_abstract(f) for f in functions_of(tree_of(path)))
    assert text.count("NotImplementedError") == abstract, "only an abstract method may raise it, as its whole body"


def is_abstract(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A method whose whole body, its docstring apart, is `raise NotImplementedError`."""
    body = [ast.unparse(node) for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return body == ["raise NotImplementedError"]


def test_fewer_than_twenty_required_dependencies() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [", 1)[1].split("\n]", 1)[0].splitlines()
    required = [line for line in lines if line.strip().startswith('"')]
    assert 1 <= len(required) < 20
    assert all("#" in line for line in required), "every dependency has its reason"


def test_third_party_imports_are_declared_dependencies() -> None:
    import sys

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    declared = {re.split(r"[<>=]", name)[0].replace("-", "_").lower() for name in re.findall(r'"([^"]+)"', text)}
    modules = {"pil": "pillow", "starlette": "fastapi", "anyio": "fastapi", "markupsafe": "jinja2"}
    used = {name.split(".")[0] for path in MODULES for _, name in imports_of(tree_of(path))} - set(sys.stdlib_module_names) - {"lmdeploy"} - OPTIONAL
    missing = {name for name in used if modules.get(name.lower(), name.lower()) not in declared}
    assert missing == set()
