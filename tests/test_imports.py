"""Everything starts on a plain machine: torch, and none of the packages that only some of the work needs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train.py", "distill.py", "evaluate.py", "synth.py")
ABSENT = ("gguf", "peft", "transformers", "triton")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "em").rglob("*.py")
)

CHILD = """
import importlib, io, contextlib, json, runpy, sys

absent, modules, scripts = json.loads(sys.argv[1])

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
failed, helps = {}, {}
for name in modules:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = error.name
for script in scripts:
    sys.argv, out = [script, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
    except ImportError as error:
        failed[script] = error.name
    except SystemExit as stop:
        helps[script] = stop.code, out.getvalue()
print(json.dumps([failed, helps]))
"""


@pytest.fixture(scope="module")
def plain():
    """({what did not start: the package it asked for}, {script: [status, what its --help says]})."""
    job = json.dumps([ABSENT, MODULES, SCRIPTS])
    command = [sys.executable, "-c", CHILD, job]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_without_gguf_peft_transformers_and_triton_all_but_the_kernels_can_be_imported(plain):
    failed, _ = plain
    assert failed == {name: "triton" for name in MODULES if name.endswith("_triton")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_them_a_script_says_how_it_is_used(plain, script):
    status, text = plain[1][script]
    assert status == 0
    assert text.startswith("usage:")


# What the standard library gained after 3.10.
LATER = {
    "asyncio.TaskGroup", "contextlib.chdir", "datetime.UTC", "enum.StrEnum", "hashlib.file_digest",
    "itertools.batched", "math.cbrt", "math.exp2", "math.sumprod", "operator.call", "typing.LiteralString",
    "typing.Never", "typing.NotRequired", "typing.Required", "typing.Self", "typing.TypeVarTuple",
    "typing.Unpack", "typing.assert_never", "typing.assert_type", "typing.override",
}  # fmt: skip


def used_names(tree: ast.AST) -> set[str]:
    """All `module.name` of a file, and the modules that it imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_the_code_is_of_python_3_10():
    for file in [*ROOT.glob("*.py"), *sorted((ROOT / "em").rglob("*.py"))]:
        names = used_names(ast.parse(file.read_text(), feature_version=(3, 10)))
        assert not names & (LATER | {"tomllib"}), file
