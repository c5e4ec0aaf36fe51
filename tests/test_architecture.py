"""Imports go one way, files stay small, and every private name of torch stands in one place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from zeroadam import ZeroAdamW, _compat

PACKAGE = Path(__file__).parents[1] / "zeroadam"
# Each line may import those above it, and itself.
LAYERS = [
    {"layout", "_compat", "report"},
    {"transport", "update", "untrusted"},
    {"reduce", "gather", "options"},
    {"state"},
    {"step_plan"},
    {"optimizer", "checkpoint", "memory_plan"},
    {"plain_file"},
    {"huggingface", "cli"},
    {"__init__", "__main__"},
]
LEVELS = {part: level for level, parts in enumerate(LAYERS) for part in parts}
TREES = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Modules of the package, also those that are imported for types only or inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zeroadam":
            for alias in node.names:
                if alias.name == "__version__":  # is there before all else
                    continue
                inside = f"{node.module}.{alias.name}".removeprefix("zeroadam.")
                yield inside if inside in MODULES else (node.module or "").removeprefix("zeroadam.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("zeroadam.") for alias in node.names if "zeroadam" in alias.name)


MODULES = {name_of(file) for file in TREES}


@pytest.mark.parametrize("file", TREES, ids=name_of)
def test_nothing_imports_what_stands_above_it(file: Path) -> None:
    own = name_of(file).split(".")[0]
    for imported in imports_of(TREES[file]):
        part = imported.split(".")[0]
        assert part == own or LEVELS[part] < LEVELS[own], f"{name_of(file)} imports {imported}"


def test_there_is_no_circle_within_a_folder() -> None:
    """A folder's own __init__ stands above its files."""
    left = {name_of(file): set(imports_of(tree)) & MODULES for file, tree in TREES.items()}
    while left:
        free = [name for name, imported in left.items() if not imported & (left.keys() - {name})]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("file", TREES, ids=name_of)
def test_a_file_past_300_lines_says_why(file: Path) -> None:
    if len(file.read_text().splitlines()) > 300:
        assert "lines" in (ast.get_docstring(TREES[file]) or "")


def test_private_names_of_torch_are_listed_and_there() -> None:
    """Of all attributes with an underscore, those that the package does not define itself are torch's."""
    used, own = set(), {"_step_supports_amp_scaling"}  # torch asks for this one; see ZeroAdam
    for tree in TREES.values():
        declared = {
            id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value is None
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr):
                (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in declared:
                own.add(node.id)
    assert used - own == set(_compat.PRIVATE), "see zeroadam/_compat.py"


def test_private_names_are_there(run_ranks: Any) -> None:
    run_ranks(look_for_private_names, 1)


def look_for_private_names() -> None:
    joinable = ZeroAdamW([torch.nn.Parameter(torch.ones(1))])  # the attributes of one that torch itself sets
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    holders = (
        torch,
        torch._C,
        torch.Tensor,
        torch.autograd.Variable,
        dist,
        dist.group.WORLD,
        backend.options,
    )
    for name in _compat.PRIVATE:
        assert any(hasattr(holder, name) for holder in (*holders, joinable, torch.amp.GradScaler("cpu"))), name


def test_private_functions_do_what_they_are_used_for() -> None:
    nested = {"optim": {"state": [{"step": 1}, {"step": 2}]}}
    flat, places = _compat.flatten_state_dict(nested)
    rebuilt: dict[str, Any] = {}
    for name, value in flat.items():
        _compat.set_element(rebuilt, places[name], value)
    assert rebuilt == nested
    assert "optim.state.1.step" in flat
    assert _compat.current_graph_task_id() == -1


def test_every_folder_is_in_the_wheel() -> None:
    listed = re.findall(r'^    "(zeroadam[\w.]*)",$', (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
    there = {".".join(file.relative_to(PACKAGE.parent).parts[:-1]) for file in PACKAGE.rglob("*.py")}
    assert set(listed) == there
