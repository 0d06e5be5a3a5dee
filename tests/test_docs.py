"The documentation builds from the notebooks without a warning, and its pages need no network."
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def name(p): return re.sub(r"^\d+[a-z]?_", "", p.stem)


def test_builds_without_warnings(site):
    out, done = site
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_every_notebook_has_a_page_in_the_side_bar(site):
    out, done = site
    home = (out / "index.html").read_text()
    for p in (ROOT / "nbs").glob("*.ipynb"):
        assert (out / f"{name(p)}.html").is_file(), p.name
        assert p.stem == "index" or f'href="{name(p)}.html"' in home, f"{p.name} is not in the side bar"


@pytest.mark.parametrize("notebook", sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb")))
def test_module_page_shows_its_functions_and_their_source(notebook, site):
    out, done = site
    module = name(Path(notebook))
    page, source = (out / f"{module}.html").read_text(), (ROOT / "framer" / f"{module}.py").read_text()
    public = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", source, re.M)
    assert [n for n in public if f'id="{n}"' not in page] == []
    assert "Show code cell source" in page


def test_pages_load_nothing_from_elsewhere(site):
    out, done = site
    if not (out / "_static/tex-svg.js").exists(): pytest.skip("MathJax comes from its CDN in this build: npm is not installed")
    for p in out.glob("*.html"):
        loads = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"|<link\b[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="(?:https?:)?//[^"]*"', p.read_text())
        assert loads == [], f"{p.name} loads {loads[:3]}"
