"""Every method has a page that says what its knobs are, how near it is to its paper, and looks the
same as the others; pictures are those that the program writes; links and anchors lead somewhere.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvfx.policies import METHODS, PRESETS
from kvfx.testing.policy_pictures.all_pictures import FOLDER, PICTURES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SECTIONS = [
    "Idea",
    "Picture",
    "Knobs",
    "Cost",
    "Exact, and not exact",
    "When not to use it",
    "Composes with",
]
OVERVIEWS = [DOCS / f"{name}.md" for name in ("policies", "fidelity", "faq", "quickstart")]
# pictures in which position or the layer decides: no sum that a CPU rounds its own way does
STEADY = ("streamingllm", "layerbudgets", "cachelatent")
# bytes
LARGEST = 25_000


def page_of(method) -> Path:
    return DOCS / "policies" / f"{method.__name__.lower()}.md"


def prose(path: Path) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What headings are called in links."""
    heads = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def knobs(path: Path) -> dict[str, str]:
    """The table of knobs: name -> default."""
    section = path.read_text().split("\n## Knobs\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", section, re.MULTILINE))


def defaults(method) -> dict[str, object]:
    """The fields of a method, and what they are if nobody says; MISSING: they have to be given."""
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(method)
    }


def broken(path: Path, text: str) -> list[str]:
    """The local links of a text whose file or anchor there is not."""
    found = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(f"{target}#{anchor}" if anchor else target)
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_page_has_the_sections(method):
    text = prose(page_of(method))
    assert f"# {method.__name__}\n" in text
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [head for head in heads if head != "Use it"] == SECTIONS
    whole = page_of(method).read_text()
    assert [
        part for part in re.split(r"^## .+$", whole, flags=re.MULTILINE) if not part.strip()
    ] == []
    assert not method.paper or method.paper in text


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_page_has_every_knob(method):
    said = knobs(page_of(method))
    known = defaults(method)
    assert list(said) == list(known)
    for name, default in known.items():
        if default is dataclasses.MISSING:
            assert said[name] == "required"
        else:
            assert ast.literal_eval(said[name].strip("`")) == default, name


def test_every_page_is_of_a_method():
    pages = {path.stem for path in (DOCS / "policies").glob("*.md")}
    assert pages == {method.__name__.lower() for method in METHODS} == set(PICTURES)


@pytest.mark.parametrize("name", ["policies", "fidelity"])
def test_overview_links_every_page(name):
    linked = set(re.findall(r"\]\(policies/(\w+)\.md\)", (DOCS / f"{name}.md").read_text()))
    assert linked == {method.__name__.lower() for method in METHODS}


def test_presets_stand_in_the_overview():
    text = (DOCS / "policies.md").read_text().replace("\\|", "|")
    assert [name for name in PRESETS if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    "path", [*OVERVIEWS, *(page_of(method) for method in METHODS)], ids=lambda path: path.stem
)
def test_links_and_anchors(path):
    assert broken(path, prose(path)) == []


@pytest.mark.parametrize(
    "path", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda path: path.stem
)
def test_links_to_policies_from_elsewhere(path):
    text = prose(path)
    links = re.findall(r"\]\([^)]*(?:policies|fidelity|faq|quickstart)[^)]*\)", text)
    assert broken(path, "\n".join(links)) == []


def test_a_broken_link_is_noticed():
    text = "[a](budgets.md#calibrate) [b](budgets.md#nowhere) [c](nothing.md) [d](#all-methods)"
    assert broken(DOCS / "policies.md", text) == ["budgets.md#nowhere", "nothing.md"]


@pytest.mark.parametrize("name", PICTURES)
def test_picture_stands_on_its_own(name):
    path = FOLDER / f"{name}.svg"
    assert path.stat().st_size < LARGEST
    root = ElementTree.fromstring(path.read_text("utf-8"))
    assert root.get("aria-label")
    assert not [node for node in root.iter() if any("href" in key for key in node.attrib)]
    page = (DOCS / "policies" / f"{name}.md").read_text()
    assert f"](../data/policies/{name}.svg)" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", STEADY)
def test_picture_is_what_the_program_writes(name):
    assert PICTURES[name]() == (FOLDER / f"{name}.svg").read_text("utf-8")
