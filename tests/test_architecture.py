"""The floors of docs/architecture.md: a package imports those below it only, and no module imports itself over others; and
the first words of docstrings."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator

import pytest
import tiny

REPOSITORY = tiny.REPOSITORY
FLOORS = (
    "pallas_kernels.devices", "pallas_kernels.quantised", "pallas_kernels.grouped_experts", "pallas_kernels.sgmm",
    "pallas_kernels.megakernel", "pallas_kernels.pregated_linear", "pallas_kernels.decode_attention",
    "pallas_kernels.prefill_attention", "pallas_kernels.prompt_experts", "adafuse_jax.core",
    "adafuse_jax.data", "adafuse_jax.models", "adafuse_jax.parallel", "adafuse_jax.adapters", "adafuse_jax.checkpoints",
    "adafuse_jax.inference", "adafuse_jax.evaluation", "adafuse_jax.training", "adafuse_jax.serving",
)  # fmt: skip
"""Packages in the order of the floors, the lowest first."""
OUTSIDE = ("benchmarks", "studies", "examples", "tests", "train", "decode")


def modules(package: str) -> dict[str, ast.Module]:
    """Module name → syntax tree, of a package's files."""
    files = sorted((REPOSITORY / package).rglob("*.py"))
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in files]
    return {
        name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in zip(names, files, strict=True)
    }


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports, at its top or within functions; not those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import: {ast.unparse(node)}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from imports(node)


ROOTS = "adafuse_jax", "pallas_kernels"
TREES = modules("adafuse_jax") | modules("pallas_kernels")
DOCUMENTED = "adafuse_jax", "pallas_kernels", "benchmarks", "examples", "studies", "tests"
FIRST_WORDS = re.compile(r"\s*(What|Whether|Why|How|Which|Of|Those|That|It|As)\b")
"""Words that begin no noun phrase and no command."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that stands alone: docstrings, and those below constants and fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def imported_modules(name: str) -> set[str]:
    """Modules of this project that `name` imports."""
    found = set()
    for dotted in imports(TREES[name]):
        module = dotted
        while module and module not in TREES:
            module = module.rpartition(".")[0]
        assert module not in ROOTS, f"{name} imports {dotted}: the package offers it to users; import its own module"
        found.add(module)
    return found - {"", name, name.rpartition(".")[0]}  # a package of docstrings and names only is no dependency


def floor(name: str) -> int | None:
    """The place of a module's package in `FLOORS`; None for the modules that stand above all, as `adafuse_jax.export`."""
    package = ".".join(name.split(".")[:2])
    return FLOORS.index(package) if package in FLOORS else None


def test_every_package_is_a_floor():
    packages = {f"{path.parts[-3]}.{path.parts[-2]}" for path in REPOSITORY.glob("*/*/__init__.py")}
    assert {name for name in packages if name.startswith(("adafuse_jax.", "pallas_kernels."))} == set(FLOORS)


@pytest.mark.parametrize("package", FLOORS)
def test_packages_import_downwards(package: str):
    mine = [name for name in TREES if floor(name) == FLOORS.index(package)]
    assert mine
    above = [
        f"{name} imports {other}"
        for name in mine
        for other in imported_modules(name)
        if floor(other) is None or floor(other) > FLOORS.index(package)
    ]
    assert not above


def test_nothing_installed_imports_what_is_not():
    names = {dotted.split(".")[0] for tree in TREES.values() for dotted in imports(tree)}
    assert not names & set(OUTSIDE)


def test_modules_are_imported_by_statements():
    """So that these tests see them; a command that loads nothing before it begins is the exception."""
    by_name = {name for name, tree in TREES.items() if "import_module" in ast.unparse(tree)}
    assert by_name == {"adafuse_jax", "adafuse_jax.evaluation.lm_eval"}


def test_there_is_no_import_circle():
    graph = {name: imported_modules(name) for name in TREES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_map_names_the_floors_in_their_order():
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    places = [text.index(f"| `{package.replace('.', '/')}` |") for package in FLOORS]
    assert places == sorted(places)


@pytest.mark.parametrize("package", DOCUMENTED)
def test_docstrings_begin_with_a_noun_or_an_imperative_verb(package: str):
    texts = [(name, *found) for name, tree in modules(package).items() for found in docstrings(tree)]
    assert len(texts) > 20
    assert not [f"{name}:{line}: {text}" for name, line, text in texts if FIRST_WORDS.match(text)]
