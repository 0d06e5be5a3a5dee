"The site as a reader sees it, in headless Chromium, with every host name unreachable."
import re, shutil, subprocess

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000"]
CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome") if shutil.which(c)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install Debian's `chromium` package to run the browser tests")


@pytest.fixture
def dom(site, tmp_path):
    "The page's elements after its scripts have run."
    out, done = site
    assert (out / "index.html").exists(), (done.stdout + done.stderr)[-3000:]

    def load(page, query=""):
        for attempt in range(3):   # a browser that starts on a busy machine sometimes gives up
            done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / f'profile{attempt}'}", "--dump-dom", (out / page).as_uri() + query],
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
            if done.returncode == 0 and "</html>" in done.stdout: return done.stdout
        pytest.fail(f"{CHROMIUM} did not show {page}: status {done.returncode}\n{done.stderr[-2000:]}")
    return load


def test_home(dom):
    page = dom("index.html")
    assert re.search(r"<title>[^<]*framer", page) and 'href="losses.html"' in page


def test_mathematics_is_drawn(dom, site):
    if not (site[0] / "_static/tex-svg.js").exists(): pytest.skip("MathJax comes from its CDN in this build: npm is not installed")
    page = dom("losses.html")
    assert page.count("<mjx-container") > 5, "formulas are not drawn"
    assert not re.search(r'<\w[^>]*data-mml-node="merror"', page), "MathJax could not read a formula"


def test_search_finds_a_word(dom):
    page = dom("search.html", "?q=InterCL")
    results = re.search(r'<ul[^>]*class="search".*?</ul>', page, re.S)
    assert results and "losses.html" in results[0], "search finds no page for InterCL"
