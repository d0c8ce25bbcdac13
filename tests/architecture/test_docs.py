"""What the documents point at is there, and each of them can be found from the README."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT)
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("components/*/README.md"),
                 *ROOT.glob("pipelines/recipes/*.md"), *ROOT.glob("bench/*.md")]
)  # fmt: skip
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(?:#([^)\s]+))?\)")
FILE = re.compile(r"`((?:src|tests|docs|bench|pipelines|components)/[\w./-]+)`")
INSIDE = re.compile(r"`((?:families|config|training|data|diffusion|steps|sources|store|cli)/\w+\.py)`")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = (ROOT / page).parent
    missing = [target for target, _ in LINK.findall(text) if not (folder / target).exists()]
    missing += [path for path in FILE.findall(text) if not (ROOT / path).exists()]
    missing += [path for path in INSIDE.findall(text) if not (ROOT / "src/kubetuner" / path).exists()]
    for target, anchor in LINK.findall(text):
        if anchor and (folder / target).is_file() and anchor not in _anchors(folder / target):
            missing.append(f"{target}#{anchor}")
    assert missing == []


def test_the_readme_names_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [page.as_posix() for page in PAGES if page.parent == Path("docs")]
    assert [page for page in pages if f"({page})" not in text] == []


def test_every_variable_of_the_environment_is_explained() -> None:
    sources = [path for folder in ("src", "pipelines", "components") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(KUBETUNER_[A-Z_]+)"', path.read_text(encoding="utf-8"))}
    told = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES if page.parts[0] == "docs")
    assert "KUBETUNER_STORE" in read
    assert sorted(name for name in read if f"`{name}`" not in told) == []


def _anchors(page: Path) -> set[str]:
    """Headings as the forges turn them into anchors."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
