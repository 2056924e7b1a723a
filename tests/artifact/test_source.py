import ast

from pgl.artifact.source import source_files


def test_imports_are_followed():
    files = source_files()
    assert {"pgl/__init__.py", "pgl/io.py", "pgl/model/gpt.py", "pgl/quant/rows.py"} <= set(files)
    assert not [name for name in files if name.startswith(("pgl/optim", "pgl/data"))]
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pgl."):
                stem = node.module.replace(".", "/")
                assert {f"{stem}.py", f"{stem}/__init__.py"} & set(files)


def test_other_roots():
    assert set(source_files(("pgl.io",))) == {"pgl/__init__.py", "pgl/errors.py", "pgl/io.py"}
