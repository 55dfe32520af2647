"""House rules that no linter knows: who imports whom, what stays cold, what a room holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNIT_LINES = 200

# DESIGN 6: room -> what it may import besides the standard library; the longest prefix holds
LEVEL_0 = ("torch", "kvfx.errors")
LEVEL_1 = (*LEVEL_0, "kvfx.geometry", "kvfx.op_table", "kvfx.ops")
LEVEL_2 = (
    *LEVEL_1,
    "sympy",
    "kvfx.graph",
    "kvfx.provenance",
    "kvfx.text",
    "kvfx.cache",
    "kvfx.cuts",
    "kvfx.min_cut",
    "kvfx.sizes",
    # a layer as a picture: what `graph.svg()` needs
    "kvfx.drawing",
)
LEVEL_3 = (*LEVEL_2, "kvfx.policy", "kvfx.verify", "kvfx.pass_manager")
LEVEL_5 = (
    *LEVEL_3,
    "kvfx.budgets",
    "kvfx.policies",
    "kvfx.passes",
    "kvfx.capture",
    "kvfx.planner",
    "kvfx.memory",
)
LAW: dict[str, tuple[str, ...]] = {
    "kvfx.kernels": ("torch", "kvfx.errors", "kvfx.kernels.common"),
    "kvfx.errors": (),
    "kvfx.geometry": LEVEL_1,
    "kvfx.op_table": LEVEL_0,
    "kvfx.ops": LEVEL_1,
    "kvfx.graph": LEVEL_2,
    "kvfx.provenance": LEVEL_2,
    "kvfx.text": LEVEL_2,
    "kvfx.cache": LEVEL_2,
    "kvfx.cuts": LEVEL_2,
    "kvfx.min_cut": (),
    "kvfx.rotation": LEVEL_2,
    "kvfx.drawing": LEVEL_2,
    "kvfx.policy": LEVEL_3,
    "kvfx.verify": LEVEL_3,
    "kvfx.pass_manager": LEVEL_3,
    # shares and counts from what was measured, as plain numbers
    "kvfx.budgets": ("torch", "kvfx.errors", "kvfx.budgets"),
    "kvfx.policies": (*LEVEL_3, "kvfx.policies", "kvfx.budgets", "kvfx.sizes"),
    # a pass is given the plan: data that was computed before
    "kvfx.constants": LEVEL_2,
    "kvfx.visibility": LEVEL_2,
    "kvfx.mask_proof": (*LEVEL_2, "kvfx.constants", "kvfx.visibility"),
    "kvfx.emit": (*LEVEL_3, "kvfx.constants", "kvfx.planner"),
    "kvfx.stages": (*LEVEL_3, "kvfx.emit"),
    "kvfx.rebuild": (*LEVEL_3, "kvfx.emit"),
    "kvfx.absorb": (*LEVEL_3, "kvfx.constants", "kvfx.emit"),
    "kvfx.programs": (*LEVEL_3, "kvfx.absorb", "kvfx.emit", "kvfx.rebuild", "kvfx.stages"),
    "kvfx.passes": (
        *LEVEL_3,
        "kvfx.passes",
        "kvfx.planner",
        "kvfx.absorb",
        "kvfx.emit",
        "kvfx.programs",
        "kvfx.rebuild",
        "kvfx.constants",
        "kvfx.mask_proof",
        "kvfx.rotation",
        "kvfx.visibility",
    ),
    "kvfx.passes.pipeline": LEVEL_5,
    "kvfx.capture": (*LEVEL_5, "transformers"),
    "kvfx.planner": LEVEL_5,
    "kvfx.memory": (*LEVEL_5, "kvfx.sizes"),
    "kvfx.sizes": ("kvfx.errors",),
    "kvfx.calibration": ("torch", "transformers", "safetensors", "kvfx"),
    "kvfx.reuse": ("torch", "transformers", "safetensors", "kvfx"),
    # pictures that are not SVG
    "kvfx.cache_trace.picture": ("torch", "matplotlib", "kvfx"),
    "kvfx.figures": ("matplotlib", "kvfx"),
    "kvfx.models": ("torch", "transformers", "safetensors", "rich", "kvfx.errors"),
    # what users touch; the rooms below are at home here
    "kvfx": ("torch", "sympy", "rich", "typer", "transformers", "kvfx"),
    "kvfx.testing.offline": ("torch", "triton", "kvfx.kernels.common"),
}
# heavy packages -> modules that may import them when they are loaded (others: inside functions)
EAGER = {
    "triton": (
        "kvfx.kernels.*.triton*",
        "kvfx.kernels.*.configs",
        # what rooms share, beside what references share
        "kvfx.kernels.common.accumulate",
        "kvfx.kernels.common.combine",
        "kvfx.kernels.common.dot",
        "kvfx.kernels.common.launch",
        "kvfx.kernels.common.rotation",
        "kvfx.kernels.common.split_attention",
        "kvfx.testing.offline",
    ),
    "transformers": ("kvfx.model", "kvfx.testing.*"),
}
# within a room: triton.py is compared with reference.py, so it cannot be made of it
APART = {"triton": "reference", "reference": "triton"}
SIZED = ("kvfx/policies/*.py", "passes/*.py", "kernels/*/reference.py")

SOURCES = sorted(
    path
    for folder in ("kvfx", "passes", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "kvfx/passes")
    and not path.is_relative_to(ROOT / "kvfx/kernels")
)
UNITS = sorted(
    path
    for folder in ("kvfx/policies", "passes")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
)
ROOMS = sorted(
    path
    for path in (ROOT / "kernels").iterdir()
    if path.name != "common" and any(path.glob("*.py"))
)


def module_name(path: Path) -> str:
    """The one name of a source file: passes/ and kernels/ live in kvfx."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "kvfx" else ("kvfx", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def allowed(module: str) -> tuple[str, ...]:
    """The row of LAW for `module`, with what its place in a kernel room adds."""
    row = max((prefix for prefix in LAW if within(module, (prefix,))), key=len)
    own = module.rsplit(".", 1)[0]
    if row != "kvfx.kernels" or own == row:
        return LAW[row]
    kernels = (
        module.rsplit(".", 1)[1].startswith(("triton", "configs")) or own == "kvfx.kernels.common"
    )
    extra = ("triton",) if kernels else ()
    return (*LAW[row], own, *extra)


def imports(tree: ast.AST) -> set[str]:
    """Absolute names of everything that `tree` imports: `from a.b import c` is `a.b.c`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def eager_imports(tree: ast.AST) -> set[str]:
    """What is imported when the module is: not inside functions, not for the type checker only."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= imports(ast.Module([node], []))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_type_checking(
            node
        ):
            names |= eager_imports(node)
    return names


def law_breaks(module: str, source: str) -> list[str]:
    """What `module` imports and may not."""
    tree = ast.parse(source)
    rows = allowed(module)
    found = [
        f"{module} imports {name}, its room may import {', '.join(rows) or 'nothing'}"
        for name in sorted(imports(tree))
        if name.split(".")[0] not in sys.stdlib_module_names and not within(name, rows)
    ]
    found += [
        f"{module} has a relative import in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    found += [
        f"{module} imports {name} when it is loaded: import it inside a function"
        for name in sorted(eager_imports(tree))
        for package, homes in EAGER.items()
        if within(name, (package,)) and not any(Path(module).match(home) for home in homes)
    ]
    room, _, file = module.rpartition(".")
    found += [
        f"{module} imports {name}: one is compared with the other"
        for name in sorted(imports(tree))
        if within(module, ("kvfx.kernels",))
        and file in APART
        and within(name, (f"{room}.{APART[file]}",))
    ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_import_law(path):
    assert law_breaks(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvfx.kernels.kivi.reference", "from kvfx.kernels.dense.reference import store"),
        ("kvfx.kernels.kivi.reference", "import triton"),
        ("kvfx.kernels.kivi.triton", "from kvfx.kernels.kivi.reference import attend"),
        ("kvfx.kernels.kivi.triton", "from kvfx.kernels.kivi import reference"),
        ("kvfx.kernels.common.rows", "from kvfx import ops"),
        ("kvfx.errors", "import torch"),
        ("kvfx.geometry", "from kvfx.policy import Policy"),
        ("kvfx.geometry", "from . import errors"),
        ("kvfx.policy", "def f():\n    from kvfx.passes.pipeline import pipeline"),
        ("kvfx.policies.kivi", "from kvfx.kernels.kivi.reference import store"),
        ("kvfx.passes.match_rope", "def f():\n    import transformers"),
        ("kvfx.passes.match_rope", "import kvfx.kernels.rope.reference"),
        ("kvfx.capture", "from transformers import AutoConfig"),
        ("kvfx.cli", "try:\n    import triton\nexcept ImportError:\n    pass"),
        ("kvfx.compiler", "import numpy"),
    ],
)
def test_import_law_finds(module, source):
    assert law_breaks(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "kvfx.kernels.kivi.triton",
            "import triton.language as tl\nfrom kvfx.kernels.common.rows import x",
        ),
        ("kvfx.kernels.kivi.triton", "from kvfx.kernels.kivi.layout import x"),
        ("kvfx.policies.kivi", "import math\nfrom kvfx.policy import Store"),
        ("kvfx.capture", "def f():\n    from transformers import AutoConfig"),
        ("kvfx.cli", "if TYPE_CHECKING:\n    from transformers import AutoConfig"),
    ],
)
def test_import_law_allows(module, source):
    assert law_breaks(module, source) == []


def run_cold(program: str) -> str:
    """Run `program` in a fresh process, from the checkout, and give what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# refuses a heavy package with the stack that asked for it
WATCHED = """
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "triton", "rich", "typer"):
            raise RuntimeError(f"kvfx is not cold: it imports {name}")
sys.meta_path.insert(0, Watch())
"""


def test_import_kvfx_is_cold():
    assert run_cold(f"{WATCHED}import kvfx; print(kvfx.__version__)") != ""


def test_cold_test_finds():
    with pytest.raises(AssertionError, match="kvfx is not cold: it imports triton"):
        run_cold(f"{WATCHED}import triton")


def test_ops_work_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
import kvfx.ops
print(torch.ops.kvfx.live_rows.reference(torch.tensor([[-1, 0]]), kv_heads=2).tolist())
"""
    assert run_cold(program) == "[[[False, True], [False, True]]]"


@pytest.mark.parametrize(
    "path", sorted(path for pattern in SIZED for path in ROOT.glob(pattern)), ids=module_name
)
def test_unit_is_one_idea_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= UNIT_LINES, (
        f"{path.relative_to(ROOT)} has {lines} lines: split it by idea, or delete"
    )


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_room_is_complete(room):
    for name in ("__init__.py", "reference.py", "README.md"):
        assert (room / name).is_file(), f"kernels/{room.name}/{name} is missing"


@pytest.mark.parametrize("unit", UNITS, ids=module_name)
def test_unit_has_its_tests(unit):
    tests = ROOT / "tests" / unit.parent.name / f"test_{unit.stem}.py"
    assert tests.is_file(), f"{tests.relative_to(ROOT)} is missing"


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_symlinked_rooms(name):
    link = ROOT / "kvfx" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    # a regular package named kernels would shadow the one that transformers imports
    assert not (ROOT / name / "__init__.py").exists()


def test_no_drawer_for_everything():
    names = {"utils", "helpers", "misc", "common_utils"}
    assert [module_name(path) for path in SOURCES if path.stem in names] == []
