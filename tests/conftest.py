"What several test files share."
import fcntl, json, os, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def no_precision_of_another_file():
    "accelerate keeps one precision for a process: each file begins without, whatever ran before it in the same worker."
    yield
    if state := sys.modules.get("accelerate.state"): state.AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def site(tmp_path_factory, request):
    "The documentation, built once into a folder of its own, also when pytest runs in several processes: (folder, result of docs/render.py)."
    parallel = hasattr(request.config, "workerinput")
    shared = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.mktemp("site")
    out, record = shared / "html", shared / "site.json"
    with open(shared / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)   # the second process waits for the first one's pages
        if not record.exists():
            env = dict(os.environ, OMP_NUM_THREADS="1")
            if not shutil.which("npm") and not (ROOT / "docs/_static/tex-svg.js").exists(): env["FRAMER_DOCS_MATHJAX"] = "cdn"
            done = subprocess.run([sys.executable, "docs/render.py", "--out", str(out)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
            record.write_text(json.dumps(dict(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)))
    return out, SimpleNamespace(**json.loads(record.read_text()))
