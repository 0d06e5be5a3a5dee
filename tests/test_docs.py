"The documentation builds from the notebooks without a warning, its pages lead to each other and need no network."
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import render  # noqa: E402

PAGES = render.page_names([p.stem for p in sorted((ROOT / "nbs").glob("*.ipynb"))])
MODULES = {stem: page for stem, page in PAGES.items() if stem[0].isdigit()}


def test_no_two_notebooks_share_a_page():
    assert len(set(PAGES.values())) == len(PAGES) > 40 and PAGES["index"] == "index"
    assert render.page_names(["18_figures", "figures", "index", "05a_kernels"]) == {"18_figures": "figures", "figures": "figures-notebook", "index": "index", "05a_kernels": "kernels"}
    for stems in (["01_losses", "02_losses"], ["01_losses", "losses", "losses-notebook"]):
        with pytest.raises(ValueError, match="names of their own"): render.page_names(stems)


def test_builds_without_warnings(site):
    out, done = site
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_every_notebook_has_a_page_in_the_side_bar(site):
    out, done = site
    home = (out / "index.html").read_text()
    for stem, page in PAGES.items():
        assert (out / f"{page}.html").is_file(), stem
        assert stem == "index" or f'href="{page}.html"' in home, f"{stem}.ipynb is not in the side bar"


@pytest.mark.parametrize("notebook", MODULES)
def test_module_page_shows_its_functions_and_their_source(notebook, site):
    out, done = site
    module = MODULES[notebook]
    page, source = (out / f"{module}.html").read_text(), (ROOT / "framer" / f"{module}.py").read_text()
    public = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", source, re.M)
    assert [n for n in public if f'id="{n}"' not in page] == []
    assert "Show code cell source" in page


def test_links_between_pages_lead_somewhere(site):
    out, done = site
    for page in out.glob("*.html"):
        tags = re.findall(r'<(?:a|img|link|source)\b[^>]*\s(?:href|src)="([^"]+)"', re.sub(r"<script\b.*?</script>", "", page.read_text(), flags=re.S))
        targets = {unquote(t.split("#")[0].split("?")[0]) for t in tags if not re.match(r"[a-z]+:|//|#", t)}
        assert sorted(t for t in targets if t and not (out / t).exists()) == [], page.name
    assert 'href="figures-notebook.html"' in (out / "stability.html").read_text().split("<article")[1]


def test_gallery_shows_its_pictures(site):
    out, done = site
    article = (out / "gallery.html").read_text().split("<article")[1].split("</article")[0]
    committed = {p.stem for p in (ROOT / "reports/figures").glob("figure-*.png") if not p.stem.endswith("-dark")}
    if not committed: pytest.skip("skipped: reports/figures holds no figures; make reports makes them")
    shown = {Path(src).stem: out / src for src in re.findall(r'<img[^>]*src="([^"]+)"', article)}
    assert set(shown) == committed and all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in shown.values())
    assert article.count("Made by nbs/") >= len(committed) and "<table" in article and "Blur Sigma" in article
    if (ROOT / "reports/ablation/ablation.md").is_file(): assert "FAW + FAM" in article and "paper: PSNR" in article


def test_pages_load_nothing_from_elsewhere(site):
    out, done = site
    if not (out / "_static/tex-svg.js").exists(): pytest.skip("MathJax comes from its CDN in this build: npm is not installed")
    for p in out.glob("*.html"):
        loads = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"|<link\b[^>]*rel="(?:stylesheet|preload|icon)"[^>]*href="(?:https?:)?//[^"]*"', p.read_text())
        assert loads == [], f"{p.name} loads {loads[:3]}"
