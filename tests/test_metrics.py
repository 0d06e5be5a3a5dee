"""Metrics against published scores. The golden set (RealSR's test pairs with OSEDiff's outputs and log) is looked for beside the
project and in $FRAMER_REALSR; it is academic data, so it is not part of the project, and where it is absent these tests say so."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyiqa")
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("FRAMER_REALSR", ROOT.parent / "shared" / "data" / "realsr"))
WEIGHTS = ROOT.parent / "shared" / "data" / "metric-weights"


def read(path):
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    return torch.from_numpy(np.asarray(image.open(path).convert("RGB")).copy()).permute(2, 0, 1) / 255


def golden(count):
    if not (GOLDEN / "osediff_published_metrics.csv").is_file():
        pytest.skip(f"the golden set is not at {GOLDEN} (set FRAMER_REALSR)")
    rows = list(csv.DictReader(open(GOLDEN / "osediff_published_metrics.csv")))
    rows = [row for row in rows if (GOLDEN / "hr" / row["image"]).is_file()]
    return rows[:: max(1, len(rows) // count)][:count]


def test_published_psnr_and_ssim():
    from framer.metrics import score
    for row in golden(3):
        scores = score(read(GOLDEN / "osediff" / row["image"]), read(GOLDEN / "hr" / row["image"]), protocol="seesr-y")
        assert scores[0]["psnr"] == pytest.approx(float(row["PSNR"]), abs=1e-4), row["image"]
        assert scores[0]["ssim"] == pytest.approx(float(row["SSIM"]), abs=1e-4), row["image"]


def test_published_lpips_dists_niqe():
    """In a process of its own: torch's hub folder is fixed when pyiqa is imported."""
    rows = golden(2)
    if not WEIGHTS.is_dir():
        pytest.skip(f"no metric weights at {WEIGHTS}")
    code = """import json, sys; sys.path.insert(0, "tests")
from test_metrics import GOLDEN, read; from framer.metrics import score
names = sys.argv[1:]
scores = score([read(GOLDEN / "osediff" / n) for n in names], [read(GOLDEN / "hr" / n) for n in names], ("lpips", "dists", "niqe"), "seesr-y")
print("RESULT" + json.dumps([list(scores), scores.missing]))"""
    out = subprocess.run([sys.executable, "-c", code, *(row["image"] for row in rows)], cwd=ROOT, capture_output=True, text=True,
                         env=dict(os.environ, TORCH_HOME=str(WEIGHTS)))
    assert out.returncode == 0, out.stderr
    scores, missing = json.loads(out.stdout.split("RESULT")[1])
    assert not missing
    for row, found in zip(rows, scores):
        for name, within in dict(LPIPS=5e-4, DISTS=3e-4, NIQE=0.02).items():
            assert found[name.lower()] == pytest.approx(float(row[name]), abs=within), (row["image"], name)


def test_nothing_is_fetched(tmp_path):
    """No socket is opened by importing, listing or scoring, with the weights absent or damaged."""
    code = """import socket
def refuse(*a, **k): raise AssertionError("the network was reached for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch; from framer.metrics import available, score
assert [row["metric"] for row in available() if row["present"]] == ["psnr", "ssim"]
image = torch.rand(1, 3, 200, 200); scores = score(image, image, None)
assert set(scores.missing) == {"lpips", "dists", "niqe"} and "not available" in scores.missing["niqe"], scores.missing
import pathlib; file = pathlib.Path(torch.hub.get_dir()) / "pyiqa" / "niqe_modelparameters.mat"; file.parent.mkdir(parents=True, exist_ok=True); file.write_bytes(b"cut short")
scores = score(image, image, None); assert "cannot be used" in scores.missing["niqe"], scores.missing
assert set(scores.means) == {"psnr", "ssim"}"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, TORCH_HOME=str(tmp_path)))
    assert out.returncode == 0, out.stderr


def test_import_needs_torch_alone():
    code = "import sys; import framer.metrics; assert not {'pyiqa', 'torchvision', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
