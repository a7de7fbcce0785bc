"""The rules of the house, read from the sources: who may import whom, and what nobody may call."""

import ast
from pathlib import Path

import pytest
from import_graph import between_folders, circles, imports

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "tf_dist").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TREES = {path: ast.parse(path.read_bytes()) for path in PACKAGE + SCRIPTS}

BASE = {
    "errors",
    "faults",
    "atomic_io",
    "invocation",
    "import_path",
    "options",
    "partition",
    "processes",
    "progress",
    "recipes",
    "spelling",
    "terminal",
    "untrusted_files",
    "users_code",
    "version",
}
# What a run is, and how a command says so: they know the options of all strategies.
RUN = {"config", "degrees", "doctor", "flags", "hosts", "restarts", "run_options", "synonyms"}
BOTTOM = BASE | RUN
ROOMS = {
    "bench", "cli", "comm", "data", "keras_fit", "layers", "models", "parallel", "strategies", "training",
}  # fmt: skip
MAY_IMPORT = {
    "comm": BASE,
    "parallel": BASE | {"comm"},
    "strategies": BASE | {"comm", "parallel"},
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(RUN, BOTTOM | {"comm", "parallel", "strategies"}),
    "data": BOTTOM,
    "models": BOTTOM,
    "layers": BOTTOM | {"comm", "models", "parallel"},
    "training": BOTTOM | ROOMS - {"bench", "cli", "keras_fit"},
    "keras_fit": BOTTOM | {"comm", "data", "parallel", "training"},
    "bench": BOTTOM | ROOMS - {"cli"},
    "cli": BOTTOM | ROOMS,
    "__main__": {"cli"},
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
    if (
        room_of(path) in BOTTOM | {"cli", "data", "parallel", "strategies"}
        or name_of(path) == "tf_dist/comm/base.py"
    ):
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


def strategy_names():
    """Every name of a strategy, as flags have it, and every class of one."""
    from tf_dist.strategies.registry import STRATEGIES

    return set(STRATEGIES), {one.__name__ for one in STRATEGIES.values()} | {"Compressed"}


def ladder_of(tree):
    """Comparisons with a strategy's name or class, and ``isinstance`` of one: what a trait is to answer."""
    names, classes = strategy_names()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in ast.walk(node):
                word = getattr(side, "id", getattr(side, "attr", getattr(side, "value", None)))
                if isinstance(word, str) and (word in names | classes or word == "STRATEGIES"):
                    yield node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            words = {getattr(one, "id", getattr(one, "attr", "")) for one in ast.walk(node.args[1])}
            if words & (classes | {"Strategy"}):
                yield node.lineno
        elif isinstance(node, ast.MatchValue | ast.MatchClass):
            words = {getattr(one, "id", getattr(one, "value", "")) for one in ast.walk(node)}
            if {word for word in words if isinstance(word, str)} & (names | classes):
                yield node.lineno


@pytest.mark.parametrize("path", PACKAGE + SCRIPTS, ids=name_of)
def test_no_strategy_is_known_outside_its_folder(path):
    """A new strategy is one file and a line of the registry: others ask for traits, and call verbs."""
    if path.is_relative_to(ROOT / "scripts") or room_of(path) not in ("strategies", "bench"):
        assert not sorted(ladder_of(TREES[path]))


def test_a_ladder_is_seen():
    for text in (
        'x = config.strategy == "zero"',
        'x = config.strategy in ("local-sgd", "diloco")',
        "x = isinstance(trainer.strategy, DiLoCo)",
        "x = trainer.strategy is STRATEGIES['zero']",
        "x = type(trainer.strategy) is strategies.AllReduce",
    ):
        assert list(ladder_of(ast.parse(text))), text


# By type alone: who helps the Trainer names it. They go with its state and its guards (decision 0033).
OF_THE_TRAINER = """
    bad_steps begin_again beginning fit held in_place neighbours saving state trainer validation verified
"""
KNOWN_CIRCLES = [
    {"tf_dist.config", "tf_dist.degrees"},
    {f"tf_dist.training.{name}" for name in OF_THE_TRAINER.split()},
    {"tf_dist.training.job", "tf_dist.training.rolling_back"},
]


def test_no_circle_of_imports_but_those_that_are_known():
    arrows = imports()
    assert circles(arrows) == KNOWN_CIRCLES
    assert circles(between_folders(arrows)) == KNOWN_CIRCLES[:1]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
