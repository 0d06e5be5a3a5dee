"What several test files share."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The documentation, built once into a folder of its own; (folder, result of docs/render.py)."
    import shutil
    out = tmp_path_factory.mktemp("site") / "html"
    env = dict(os.environ, OMP_NUM_THREADS="1")
    if not shutil.which("npm") and not (ROOT / "docs/_static/tex-svg.js").exists(): env["FRAMER_DOCS_MATHJAX"] = "cdn"
    done = subprocess.run([sys.executable, "docs/render.py", "--out", str(out)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    return out, done
