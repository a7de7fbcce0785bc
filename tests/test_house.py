"""The rules of the house, read from the sources: who may import whom, and what nobody may call."""

import ast
from pathlib import Path

from import_graph import between_folders, circles, folder_of, imports

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "tf_dist").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
TREES = {path: ast.parse(path.read_bytes()) for path in PACKAGE + SCRIPTS}
GRAPH = imports()

# From the bottom up: a folder (or a module that lies at the top) imports what stands on floors below its own.
FLOORS = [
    {
        "errors",
        "import_path",
        "invocation",
        "processes",
        "renamed_modules",
        "spelling",
        "untrusted_files",
        "version",
    },
    {
        "atomic_io",
        "comm",
        "corpora",
        "faults",
        "metrics",
        "options",
        "partition",
        "recipes",
        "synonyms",
        "terminal",
        "users_code",
    },
    {"comm.transport", "progress"},
    {"comm.health", "keras_callbacks"},
    {"comm.runtime"},
    {"parallel"},
    {"strategies"},
    {"config"},
    {"data", "decoding", "models", "run_options"},
    {"flags", "keras_fit", "layers", "optim", "tasks"},
    {"ops", "runners"},
    {"checkpoint", "pipeline"},
    {"huggingface", "zero"},
    {"training"},
    {"run"},
    {"bench"},
    {"bench.faults", "cli"},
    {"__main__", "callbacks"},
    {"tf_dist"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# They know neither TensorFlow nor Keras: a command answers `--help` without loading it.
WITHOUT_TENSORFLOW = {name for names in FLOORS[:8] for name in names} - {
    "comm.transport", "comm.health", "comm.runtime", "keras_callbacks",
} | {"cli", "data", "decoding", "flags", "ops", "run_options", "tasks"}  # fmt: skip
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


def folder_named(path):
    """``comm.transport``, ``optim``; of a module that lies at the top of the package, its own name."""
    parts = path.relative_to(ROOT / "tf_dist").with_suffix("").parts
    return ".".join(parts[:-1]) or parts[0].replace("__init__", "tf_dist")


def own_rooms(path):
    """The first part of what a file imports of the package."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("tf_dist.")}


def each(paths):
    """One test of many files, which names those that fail: a test of each is reported longer than it runs."""

    def of(check):
        def test():
            failed = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    failed.append(f"{name_of(path)}: {error}")
            assert not failed, "\n".join(failed)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return of


def test_every_folder_has_a_floor():
    assert {folder_named(path) for path in PACKAGE} == FLOOR_OF.keys()
    assert SCRIPTS


@each(PACKAGE)
def test_imports_go_strictly_down(path):
    here = folder_named(path)
    arrows = GRAPH[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")]
    others = {folder_of(module).removeprefix("tf_dist.") for module in arrows} - {here}
    # Who asks for the version, or names the public API in a type, names the package.
    above = {name for name in others - {"tf_dist"} if FLOOR_OF[name] >= FLOOR_OF[here]}
    assert not above


@each(PACKAGE)
def test_only_comm_talks_to_mpi_and_horovod(path):
    if not folder_named(path).startswith("comm"):
        assert not foreign(path) & {"mpi4py", "horovod"}


@each(PACKAGE)
def test_no_tensorflow_where_none_is_needed(path):
    if folder_named(path) in WITHOUT_TENSORFLOW or name_of(path) == "tf_dist/comm/transport/base.py":
        assert not foreign(path) & {"tensorflow", "keras"}


@each(PACKAGE + SCRIPTS)
def test_pytorch_stays_in_files_that_nothing_else_imports(path):
    # They are run by the Python of .venv-torch, which has no TensorFlow and no MPI.
    theirs = {name for name in imported(path) if name.startswith("tf_dist.bench.torch_")}
    if path.name.startswith("torch_"):
        assert "tensorflow" not in foreign(path) and "keras" not in foreign(path)
        assert own_rooms(path) <= {"bench"}
    else:
        assert "torch" not in foreign(path) and not theirs


@each(SCRIPTS)
def test_scripts_are_thin(path):
    assert not foreign(path) & {script.stem for script in SCRIPTS}
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


@each(TREES)
def test_nothing_that_is_read_can_run_code(path):
    banned = {"pickle", "cPickle", "marshal", "dill", "shelve", "load_model", "unsafe_load", "allow_pickle"}
    assert not [(name, line) for name, line in identifiers(TREES[path]) if name in banned]
    calls = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert not [
        call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec")
    ]
    assert not [call.lineno for call in calls for word in call.keywords if word.arg in banned]


@each(TREES)
def test_functions_fit_on_a_screen(path):
    functions = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION}


def test_no_class_name_stands_for_two_classes():
    homes = {}
    for path in PACKAGE:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name_of(path))
    assert not {name: found for name, found in homes.items() if len(found) > 1}


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


@each(PACKAGE + SCRIPTS)
def test_no_strategy_is_known_outside_its_folder(path):
    """A new strategy is one file and a line of the registry: others ask for traits, and call verbs."""
    if path.is_relative_to(ROOT / "scripts") or folder_named(path) not in ("strategies", "bench"):
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


def test_no_circle_of_imports():
    assert not circles(GRAPH)
    assert not circles(between_folders(GRAPH))


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
