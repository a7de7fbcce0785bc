"""The import graph of the package, read from the sources, `TYPE_CHECKING` included: arrows, circles, floors.

python tests/import_graph.py        # what docs/architecture.md says of folders, counted
"""

import ast
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def modules():
    """Dotted name -> file, of the package."""
    names = {}
    for path in sorted((ROOT / "tf_dist").rglob("*.py")):
        names[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return names


def imports():
    """Module -> the modules of the package that it imports, anywhere in the file."""
    known = modules()
    found = {}
    for name, path in known.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                both = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {full if full in known else node.module for full in both.values()}
        found[name] = (targets & known.keys()) - {name}
    return found


def folder_of(module):
    """The folder of a module; of one that lies at the top, itself."""
    path = modules()[module].relative_to(ROOT)
    return ".".join(path.parts[:-1]) if len(path.parts) > 2 else module


def between_folders(arrows):
    """The same graph between folders."""
    folders = {module: folder_of(module) for module in arrows}
    found = defaultdict(set)
    for module, targets in arrows.items():
        found[folders[module]] |= {folders[target] for target in targets} - {folders[module]}
    return dict(found)


def circles(arrows):
    """Sets of nodes that reach each other: strongly connected components of two and more (Tarjan 1972)."""
    number, low, stack, found = {}, {}, [], []

    def visit(node):
        number[node] = low[node] = len(number)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in number:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == number[node]:
            component = {stack[i] for i in range(stack.index(node), len(stack))}
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in sorted(arrows):
        if node not in number:
            visit(node)
    return found


def floors(arrows):
    """Node -> how many floors lie below it; nodes of one circle share a floor."""
    circle_of = {node: frozenset(circle) for circle in circles(arrows) for node in circle}
    height = {}

    def floor(node):
        if node not in height:
            height[node] = 0
            below = arrows.get(node, set()) - circle_of.get(node, frozenset())
            height[node] = max((floor(target) + 1 for target in below), default=0)
        return height[node]

    return {node: floor(node) for node in sorted(arrows)}


def main():
    arrows = imports()
    folders = between_folders(arrows)
    sizes = Counter(folder_of(module) for module in arrows)
    heights = floors(folders)
    for folder in sorted(folders, key=lambda name: (-heights[name], name)):
        below = ", ".join(sorted(name.removeprefix("tf_dist.") for name in folders[folder]))
        print(f"{heights[folder]:2}  {folder} ({sizes[folder]})  -> {below}")
    print(
        f"\n{len(arrows)} modules, {sum(map(len, arrows.values()))} arrows, circles: "
        f"{[sorted(circle) for circle in circles(arrows)]}"
    )
    print(
        f"{len(folders)} folders and modules at the top, {sum(map(len, folders.values()))} arrows, "
        f"{max(heights.values()) + 1} floors, circles: {[sorted(circle) for circle in circles(folders)]}"
    )


if __name__ == "__main__":
    main()
