"""The rules of the house, read from the sources: who may import whom, and what nobody may call."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "tf_dist").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TREES = {path: ast.parse(path.read_bytes()) for path in PACKAGE + SCRIPTS}

BOTTOM = {
    "choices",
    "config",
    "degrees",
    "doctor",
    "errors",
    "faults",
    "atomic_io",
    "flags",
    "hosts",
    "invocation",
    "import_path",
    "processes",
    "progress",
    "recipes",
    "restarts",
    "run_options",
    "synonyms",
    "terminal",
    "untrusted_files",
    "version",
}
ROOMS = {"bench", "cli", "comm", "data", "keras_fit", "layers", "models", "parallel", "training"}
MAY_IMPORT = {
    "comm": BOTTOM,
    "data": BOTTOM,
    "models": BOTTOM,
    "parallel": BOTTOM | {"comm"},
    "layers": BOTTOM | {"comm", "models", "parallel"},
    "training": BOTTOM | ROOMS - {"bench", "cli", "keras_fit"},
    "keras_fit": BOTTOM | {"comm", "data", "parallel", "training"},
    "bench": BOTTOM | ROOMS - {"cli"},
    "cli": BOTTOM | ROOMS,
    "__main__": {"cli"},
    **dict.fromkeys(BOTTOM, BOTTOM),
}
# They build and examine Horovod and other peers, so they import them.
EXAMINERS = {"build_horovod.py", "check_peers.py"}
LONGEST_FUNCTION = 60


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Every module that a file imports, at the top or inside a function, as dotted names."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative imports hide the room"
            # `from tf_dist import errors` imports a module, too.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def foreign(path):
    return {name.split(".")[0] for name in imported(path)}


def own_rooms(path):
    """The rooms, and modules of the bottom, that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("tf_dist.")}


def room_of(path):
    return path.relative_to(ROOT / "tf_dist").parts[0].removesuffix(".py")


def test_there_is_something_to_check():
    assert {room_of(path) for path in PACKAGE} >= BOTTOM | ROOMS
    assert SCRIPTS


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_strictly_down(path):
    room = room_of(path)
    if room in MAY_IMPORT:
        assert own_rooms(path) <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_only_comm_talks_to_mpi_and_horovod(path):
    if room_of(path) != "comm":
        assert not foreign(path) & {"mpi4py", "horovod"}


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_tensorflow_where_none_is_needed(path):
    if room_of(path) in BOTTOM | {"cli", "data", "parallel"} or name_of(path) == "tf_dist/comm/base.py":
        assert not foreign(path) & {"tensorflow", "keras"}


@pytest.mark.parametrize("path", PACKAGE + SCRIPTS, ids=name_of)
def test_pytorch_stays_in_files_that_nothing_else_imports(path):
    # They are run by the Python of .venv-torch, which has no TensorFlow and no MPI.
    theirs = {name for name in imported(path) if name.startswith("tf_dist.bench.torch_")}
    if path.name.startswith("torch_"):
        assert "tensorflow" not in foreign(path) and "keras" not in foreign(path)
        assert own_rooms(path) <= {"bench"}
    else:
        assert "torch" not in foreign(path) and not theirs


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_thin(path):
    assert not foreign(path) & {script.stem for script in SCRIPTS}
    assert own_rooms(path) <= BOTTOM | ROOMS
    assert not [n for n in imported(path) if n.startswith("tf_dist") and n.split(".")[-1].startswith("_")]
    if path.name not in EXAMINERS:
        assert not foreign(path) & {"mpi4py", "horovod", "tensorflow", "keras"}


def identifiers(tree):
    """Names that are used, with their lines; what docstrings and comments say is not among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for name in [module, *(alias.name for alias in node.names)]:
                yield from ((part, node.lineno) for part in name.split("."))


@pytest.mark.parametrize("path", TREES, ids=name_of)
def test_nothing_that_is_read_can_run_code(path):
    banned = {"pickle", "cPickle", "marshal", "dill", "shelve", "load_model", "unsafe_load", "allow_pickle"}
    assert not [(name, line) for name, line in identifiers(TREES[path]) if name in banned]
    calls = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert not [
        call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec")
    ]
    assert not [call.lineno for call in calls for word in call.keywords if word.arg in banned]


@pytest.mark.parametrize("path", TREES, ids=name_of)
def test_functions_fit_on_a_screen(path):
    functions = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION}
