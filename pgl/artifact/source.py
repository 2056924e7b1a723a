"""The source that a packed model needs to run, found by following imports."""

import ast
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec

ROOTS = ("pgl.artifact", "pgl.model")
"""What an artifact must be able to do by itself: read its weights and run them."""


def source_files(roots: tuple[str, ...] = ROOTS) -> dict[str, bytes]:
    """Return the modules of pgl that `roots` import, directly or not, by path ("pgl/io.py").

    Imports inside functions count too. Comments and docstrings are left out: they take a third of
    the bytes, and bytes are weights. Works for an installed pgl and for one that runs from inside
    an artifact, with the same result.
    """
    found: dict[str, bytes] = {}
    waiting = list(roots)
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{module} is imported but cannot be found"
        text = spec.loader.get_source(module)  # type: ignore[union-attr]
        found[_path(spec)] = code_only(text).encode()
        if "." in module:
            waiting.append(module.rpartition(".")[0])
        waiting.extend(_imports(text))
    return dict(sorted(found.items()))


def code_only(text: str) -> str:
    """Return source without comments and docstrings, strings under attributes among them."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [statement for statement in body if not _is_text(statement)]
            node.body = kept or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return f"{ast.unparse(tree)}\n"


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _path(spec: ModuleSpec) -> str:
    is_package = spec.submodule_search_locations is not None
    return spec.name.replace(".", "/") + ("/__init__.py" if is_package else ".py")


def _imports(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            assert node.level == 0, "pgl imports by full names"
            assert node.module is not None
            yield node.module
            package = importlib.util.find_spec(node.module)
            if package is not None and package.submodule_search_locations is not None:
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name for name in names if importlib.util.find_spec(name))


def _is_ours(module: str) -> bool:
    return module == "pgl" or module.startswith("pgl.")
