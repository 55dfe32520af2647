"""What the README and the pages show is run, as a reader would run it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from kvfx.cli import app
from kvfx.testing.tiny import tiny_llama

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# their fences are files: a module, its test, and a program that uses it
OF_YOUR_OWN = sorted((ROOT / "docs").glob("new_*.md"))
# tags of fences that nothing runs, because they show output
SHOWN = ("text", "diff")
# programs of the project that are no command of kvfx
MODULES = (
    "pytest",
    "kvfx.testing.shipped",
    "kvfx.testing.policy_pictures",
    "examples.benchmarks.peers",
    "examples.benchmarks.reproduce",
)
# commands that need no model
CHEAP = ("kvfx policies", "kvfx --help")


@dataclass(frozen=True)
class Fence:
    """A code block of a page: its tag, text, and first line."""

    page: Path
    tag: str
    text: str
    line: int


def fences(page: Path, tag: str | None = None) -> list[Fence]:
    """The code blocks of a page, all or those with a tag."""
    text = page.read_text()
    found = [
        Fence(page, match[1], match[2], text.count("\n", 0, match.start()) + 2)
        for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
    return [fence for fence in found if tag in (None, fence.tag)]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(page: Path) -> Iterator[str]:
    """The commands of a page's shell fences, one a line."""
    for fence in fences(page, "bash"):
        lines = fence.text.replace("\\\n", " ").splitlines()
        yield from (line.strip() for line in lines if line.strip() and not line.startswith("#"))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_fence_says_what_it_is(page):
    known = {"python", "bash", *SHOWN}
    odd = [(fence.line, fence.tag) for fence in fences(page) if fence.tag not in known]
    assert not odd
    assert page.read_text().count("```") == 2 * len(fences(page))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in OF_YOUR_OWN and fences(page, "python")],
    ids=named,
)
def test_python_of_page(page, request, tmp_path, monkeypatch):
    """All blocks of a page run in order, in one namespace; a comment names the page's `model`."""
    monkeypatch.chdir(tmp_path)
    source = re.search(r"<!-- model: (\w+) -->", page.read_text())
    assert source is not None, "a page with Python says which model it has"
    for package in re.findall(r"<!-- needs: (\w+) -->", page.read_text()):
        pytest.importorskip(package)
    namespace: dict[str, object] = {"__name__": "page"}
    if source[1] == "smollm2":
        model, tokenizer = request.getfixturevalue("smollm2")
        monkeypatch.setattr("kvfx.models.load", lambda _: (model, tokenizer))
        namespace |= {"model": model, "tokenizer": tokenizer}
    else:
        namespace["model"] = tiny_llama(head_dim=32, layers=4)
    for fence in fences(page, "python"):
        # as many empty lines before it as the page has, so that a traceback names the page's line
        code = compile("\n" * (fence.line - 1) + fence.text, str(page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_of_page(page):
    """Every `kvfx` command and option exists, and so does every `make` target."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        words = [word for word in shlex.split(line, comments=True) if not is_setting(word)]
        if words[0] == "kvfx":
            check_command(words[1:])
        elif words[0] == "make":
            assert words[1] in targets, line
        else:
            run = words[:2] == ["python", "-m"] and words[2] in MODULES
            assert run or words[0] in ("pip", "rm"), line


def is_setting(word: str) -> bool:
    """Whether a word sets a variable for the command, as in `KVFX_PRINT=after-all kvfx ...`."""
    return re.fullmatch(r"[A-Z_]+=.*", word) is not None


def check_command(words: list[str]) -> None:
    """Parse words as the command line does, without running the command."""
    command = typer.main.get_command(app)
    if words == ["--help"]:
        return
    while hasattr(command, "commands"):
        known = command.commands  # type: ignore[attr-defined]
        assert words[0] in known, f"there is no command {words[0]!r}"
        command, words = known[words[0]], words[1:]
    command.make_context("kvfx", list(words), resilient_parsing=False)


@pytest.mark.parametrize("line", CHEAP)
def test_cheap_command(line):
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0
    assert result.output.strip()


def test_a_wrong_command_is_noticed():
    with pytest.raises(AssertionError, match="no command 'runn'"):
        check_command(["runn", "smollm2"])
    with pytest.raises(Exception, match="--polcy"):
        check_command(["explain", "smollm2", "--polcy", "k8v4"])


@pytest.mark.slow
@pytest.mark.parametrize("page", OF_YOUR_OWN, ids=named)
def test_files_of_page(page, tmp_path):
    """The module and the test of the page, as files in an empty folder; then its last block."""
    module, test = re.findall(r"^## The \w+: `(\w+\.py)`$", page.read_text(), re.MULTILINE)
    blocks = [fence.text for fence in fences(page, "python")]
    model = "from kvfx.testing.tiny import tiny_llama\nmodel = tiny_llama(head_dim=32)\n"
    blocks[2] = model + blocks[2]
    for name, text in zip((module, test, "use.py"), blocks, strict=True):
        (tmp_path / name).write_text(text)
    # one thread: workers of a parallel test run share the cores
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    here = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for arguments in (("-m", "pytest", "-q", "-p", "no:cacheprovider", test), ("use.py",)):
        run = subprocess.run(
            (sys.executable, *arguments), cwd=tmp_path, env=here, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout
