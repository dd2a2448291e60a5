"""The rooms of the package: arrows point down, no file imports in a circle, private names stay at
home."""

import ast
from pathlib import Path

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "c2f_jax"
# A room may import those after it, and nothing else.
ROOMS = (
    "main commands compile ablate train harnesses serving evaluate search export retriever index "
    "items inference matcher config data_check reports pretrained training galleries retrieval "
    "datasets models data decoding objectives hardware exported errors"
).split()


def module_name(file):
    """The name that a file of the package is imported by."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file):
    """(module, name or None) of each import of the package in a file, those inside functions
    too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "c2f_jax":
            for alias in node.names:
                if alias.name == "__version__":  # the package's own, in no room
                    continue
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in FILES else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "c2f_jax":
                    yield alias.name, None


def room(module):
    return (module.split(".") + [""])[1]


def test_every_room_is_in_the_order():
    assert {room(module) for module in FILES} - {"", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_arrows_point_down(name):
    allowed = {name, *ROOMS[ROOMS.index(name) + 1 :]}
    climbing = [
        f"{module} imports {target}"
        for module, file in FILES.items()
        if room(module) == name
        for target, _ in imports(file)
        if room(target) not in allowed
    ]
    assert not climbing


def test_no_file_circle():
    arrows = {
        module: {target for target, _ in imports(file)} - {module}
        for module, file in FILES.items()
        if module != "c2f_jax"  # its public names load what they need when they are first used
    }
    while leaves := [module for module in arrows if not arrows[module] & arrows.keys()]:
        for module in leaves:
            del arrows[module]
    assert not arrows, f"in or above a circle: {sorted(arrows)}"


def test_private_names_stay_in_their_file():
    taken = [
        f"{module} takes {name} from {target}"
        for module, file in FILES.items()
        for target, name in imports(file)
        if target != module and (name or target.rsplit(".")[-1]).startswith("_")
    ]
    assert not taken


def test_no_room_is_larger_than_15_percent():
    lines = {module: len(file.read_text().splitlines()) for module, file in FILES.items()}
    for name in ROOMS:
        share = sum(count for module, count in lines.items() if room(module) == name)
        assert share < 0.15 * sum(lines.values()), name


def test_no_test_imports_from_another_test():
    for file in Path(ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in [module or "", *names]:
                assert not name.split(".")[-1].startswith("test_"), f"{file} imports {name}"
