"""The shape of the code, read from its source: which file may import which, how long files are, and what may not be used at all."""

import ast
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import specedge

ROOT = Path(__file__).parents[1]
LEVELS = {"config": 0, "tree": 0, "text": 0, "chat": 0, "kernels": 1, "engine": 2, "net": 3, "settings": 4, "cli": 4}
EXTENSION = "_C"  # the compiled ops, wherever they are put; only kernels may touch them
MAX_LINES = 500
WIRE_MAY_IMPORT = {"specedge.tree", "numpy", "struct", "msgspec", "typing"}
OUTSIDE = {"tests", "bench", "tools", "examples", "transformers"}
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "builtins.eval", "builtins.exec", "torch.load", "os.system", "os.popen",
}  # fmt: skip
FORBIDDEN_METHODS = {"send_pyobj", "recv_pyobj"}  # pyzmq's way to pickle
FORBIDDEN_KEYWORDS = {"shell", "allow_pickle"}

CONTAINERS = {
    "list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "WeakKeyDictionary", "WeakValueDictionary", "count",
}  # fmt: skip
CHANGES = {
    "append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "popleft", "remove", "discard", "clear", "sort",
    "reverse",
}  # fmt: skip

FILES = sorted((ROOT / "specedge").rglob("*.py"))
SOURCES = [*FILES, *sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".hpp", ".cu", ".cuh"})]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Every module or name that a file imports, at any depth, in dotted form; relative imports are resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def wrong_way(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of `module` that go to the right, or through the public names of the package."""
    level = LEVELS.get((module.split(".") + [""])[1], -1)
    wrong = []
    for target in imports(source, module, is_package):
        parts = target.split(".")
        if parts[0] != "specedge" or target == "specedge.__version__":
            continue
        there = LEVELS["kernels"] if EXTENSION in parts else LEVELS.get((parts + [""])[1], 99)
        if there > level:
            wrong.append(target)
    return wrong


def dangers(source: str) -> list[str]:
    """What runs bytes as code: pickles, eval and exec, shells."""
    found = [name for name in imports(source, "specedge.x") if set(name.split(".")) & PICKLES or name in FORBIDDEN_CALLS]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS):
            found.append(name or ast.unparse(node.func))
        for word in node.keywords:
            harmless = isinstance(word.value, ast.Constant) and not word.value.value
            if word.arg in FORBIDDEN_KEYWORDS and not harmless:
                found.append(f"{word.arg}=")
    return found


def global_state(source: str) -> list[str]:
    """Names of a module that its functions change: by a `global` statement, or as a container made at the top that a function assigns to, deletes
    from, or calls a changing method of (`next`, of a count). What a function does to an argument is not followed; @cache, which only remembers, and
    what belongs to other modules are not looked at."""
    tree, made = ast.parse(source), set[str]()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value, targets = node.value, node.targets if isinstance(node, ast.Assign) else [node.target]
            mutable = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
            if isinstance(value, ast.Call):
                kind = value.func.value if isinstance(value.func, ast.Subscript) else value.func  # list[int]() is a list
                mutable = dotted(kind).split(".")[-1] in CONTAINERS
            made |= {t.id for t in targets if mutable and isinstance(t, ast.Name)}
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    found = set[str]()
    for function in functions:
        for node in ast.walk(function):
            names = list[str]()
            if isinstance(node, ast.Global):
                found |= set(node.names)
            elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                names = [dotted(node.value)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
                names = [dotted(node.func.value)]
            elif isinstance(node, ast.Call) and dotted(node.func) == "next":
                names = [dotted(a) for a in node.args[:1]]
            found |= made.intersection(names)
    return sorted(found)


def opens_with_docstring(source: str) -> bool:
    return not source.strip() or bool((ast.get_docstring(ast.parse(source)) or "").strip())


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)
each_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


def test_the_files_are_found() -> None:
    found = {module_of(path) for path in FILES}
    assert {"specedge", "specedge.config", "specedge.tree", "specedge.net.wire", "specedge.engine"} <= found
    top = {name.split(".")[1] for name in found if "." in name}
    assert top <= set(LEVELS), f"{top - set(LEVELS)} has no place in the order of imports"


@each_file
def test_imports_run_one_way(path: Path) -> None:
    if path == ROOT / "specedge" / "__init__.py":
        pytest.skip("the public names may come from anywhere; test_import_specedge_is_lazy looks at this file")
    assert wrong_way(path.read_text(), module_of(path), path.name == "__init__.py") == []


@each_file
def test_nothing_imports_what_lies_outside(path: Path) -> None:
    assert [name for name in imports(path.read_text(), module_of(path), path.name == "__init__.py") if name.split(".")[0] in OUTSIDE] == []


@each_file
def test_nothing_runs_bytes_as_code(path: Path) -> None:
    assert dangers(path.read_text()) == []


@each_file
def test_there_is_no_global_state(path: Path) -> None:
    assert global_state(path.read_text()) == []


def test_types_are_packaged() -> None:
    assert (ROOT / "specedge" / "py.typed").is_file()
    assert "py.typed" in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["specedge"]


@each_file
def test_files_open_with_a_docstring(path: Path) -> None:
    assert opens_with_docstring(path.read_text())


@each_source
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def undocumented(name: str, kind: type) -> list[str]:
    """Which of a class and of its public methods and properties say nothing of themselves; fields are said beside them, or in the class."""
    members = {f"{name}.{m}": inspect.getattr_static(kind, m) for m in dir(kind) if not m.startswith("_")}
    methods = {n: m for n, m in members.items() if isinstance(m, property | classmethod | staticmethod | FunctionType)}
    return [n for n, m in {name: kind, **methods}.items() if not (inspect.getdoc(m) or "").strip()]


@pytest.mark.parametrize("name", specedge.__all__)
def test_public_names_are_documented(name: str) -> None:
    kind = getattr(specedge, name)
    assert undocumented(name, kind) == [] and not kind.__doc__.startswith(f"{name}("), "a dataclass without a docstring gets its signature"


def test_wire_imports_only_what_an_edge_has() -> None:
    names = list(imports((ROOT / "specedge/net/wire.py").read_text(), "specedge.net.wire"))
    assert names and [n for n in names if not any(n == may or n.startswith(may + ".") for may in WIRE_MAY_IMPORT)] == []


def test_import_specedge_is_lazy() -> None:
    """`import specedge` reads no other file of the package, so that a thin client can take specedge.net.wire alone."""
    assert run_python("import sys, specedge; print([m for m in sys.modules if m.startswith('specedge.') or m in ('torch', 'zmq')])") == "[]"


@pytest.mark.parametrize("module", ["config", "tree", "text", "net.wire"])
def test_light_modules_do_not_import_torch(module: str) -> None:
    assert run_python(f"import sys, specedge.{module}; print('torch' in sys.modules)") == "False"


# ---- the tests above can fail: their eyes on sources that are wrong ----


@pytest.mark.parametrize(
    ("module", "source", "seen"),
    [
        ("specedge.tree", "from specedge.kernels import ops", ["specedge.kernels.ops"]),
        ("specedge.config", "import specedge.net.wire", ["specedge.net.wire"]),
        ("specedge.kernels.linear", "def f():\n    from specedge.engine.model import Decoder", ["specedge.engine.model.Decoder"]),
        ("specedge.kernels.linear", "from ..engine import model", ["specedge.engine.model"]),
        ("specedge.engine.model", "from specedge import net", ["specedge.net"]),
        ("specedge.engine.model", "import importlib\nimportlib.import_module('specedge.cli')", ["specedge.cli"]),
        ("specedge.net.server", "from specedge import cli", ["specedge.cli"]),
        ("specedge.net.server", "from specedge import Engine", ["specedge.Engine"]),
        ("specedge.net.server", "import specedge", ["specedge"]),
        ("specedge.tree", "import specedge._C", ["specedge._C"]),
        ("specedge.engine.model", "from .. import kernels\nfrom . import batch\nfrom specedge.tree import EMPTY\nimport torch", []),
        ("specedge.cli", "from specedge.net import server\nfrom specedge import __version__", []),
        ("specedge.kernels.ops", "from specedge.kernels import _C", []),
    ],
)
def test_the_reader_of_imports(module: str, source: str, seen: list[str]) -> None:
    assert wrong_way(source, module) == seen


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "def f():\n    import dill", "from torch import load",
        "import torch\ntorch.load('x')", "eval('1')", "exec('x')", "import builtins\nbuiltins.eval('1')", "from os import system",
        "import subprocess\nsubprocess.run('ls', shell=True)", "f(shell=flag)", "import os\nos.system('ls')",
        "socket.recv_pyobj()", "self.socket.send_pyobj(1)", "np.load('x', allow_pickle=True)", "__import__('pickle')",
    ],
)  # fmt: skip
def test_the_reader_of_dangers_sees(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "import torch\ntorch.loads = 1", "run(['ls'], shell=False)", "x = 'pickle'", "re.compile('a')"]
)
def test_the_reader_of_dangers_passes(source: str) -> None:
    assert dangers(source) == []


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("x = 0\ndef f():\n    global x\n    x = 1", ["x"]),
        ("X = []\ndef f():\n    X.append(1)", ["X"]),
        ("X: dict[int, int] = {}\ndef f():\n    X[1] = 2", ["X"]),
        ("X = {}\nclass A:\n    def f(self):\n        X[1] += 2", ["X"]),
        ("X = {1: 2}\ndef f():\n    del X[1]", ["X"]),
        ("import collections\nX = collections.defaultdict(list)\nasync def f():\n    X.pop(1)", ["X"]),
        ("X = list[int]()\nf = lambda: X.clear()", ["X"]),
        ("X = [i for i in y]\ndef f():\n    def g():\n        X.sort()", ["X"]),
        ("import itertools\nX = itertools.count()\ndef f():\n    return next(X)", ["X"]),
        ("X = []\nfor i in y:\n    X.append(i)", []),  # it is complete when the module is
        ("X = {1: 2}\ndef f():\n    return X[1], X.get(2), sorted(X)", []),
        ("def f():\n    x = []\n    x.append(1)\n    return x", []),
        ("class A:\n    def f(self):\n        self.X = []\n        self.X.append(1)", []),
        ("X = (1, 2)\nY = frozenset({1})\ndef f():\n    return X", []),
    ],
)
def test_the_reader_of_global_state(source: str, seen: list[str]) -> None:
    assert global_state(source) == seen


def test_the_reader_of_docstrings() -> None:
    assert opens_with_docstring("") and opens_with_docstring("\n") and opens_with_docstring('"""What it does."""\nx = 1')
    assert not opens_with_docstring("x = 1") and not opens_with_docstring('x = 1\n"""Late."""') and not opens_with_docstring('""" """\n')


def test_the_reader_of_public_names() -> None:
    class Silent:
        field = 1

        def method(self) -> None: ...

        @property
        def value(self) -> None:
            """Says something."""

    assert undocumented("S", Silent) == ["S", "S.method"]


def test_engines_need_no_network() -> None:
    """A machine that only computes, such as one for bench.gpu, has neither pyzmq nor msgspec."""
    code = "import sys, specedge.engine.aio, specedge.engine.speculative; print({'zmq', 'msgspec'} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_the_cpu_path_does_not_import_triton() -> None:
    code = "import sys, specedge; specedge.SpeculativeEngine, specedge.Edge, specedge.Server; print('triton' in sys.modules)"
    assert run_python(code) == "False"
