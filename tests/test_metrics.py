"""Metrics of tensors: the same numbers in training and evaluation, no network, no import beyond torch. Published and frozen scores
are in test_evaluation.py."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyiqa")
ROOT = Path(__file__).resolve().parents[1]


def test_training_and_evaluation_take_the_same_values():
    "The validation of a run scores tensors; the same pictures in files get the same numbers."
    evaluation, training = pytest.importorskip("framer.evaluation"), pytest.importorskip("framer.training")
    small = ROOT / "tests" / "golden"
    pairs = evaluation.match_files(small / "results", small / "hr")
    sides = [torch.stack([evaluation.read_image(path)[0] for path in side]) for side in zip(*pairs)]
    scores, found = evaluation.evaluate(small / "results", small / "hr", metrics=["psnr", "ssim"]), training.mean_scores(*sides)
    assert found["protocol"] == scores.protocol == "framer" and found["versions"] == scores.versions and found["missing"] == {}
    for name in ("psnr", "ssim"):
        assert found[name] == pytest.approx(scores.means[name], abs=1e-5)
        assert [row[name] for row in found["per_image"]] == pytest.approx([row[name] for row in scores], abs=1e-5)


def test_nothing_is_fetched(tmp_path):
    """No socket is opened by importing, listing or scoring, with the weights absent or damaged."""
    code = """import socket
def refuse(*a, **k): raise AssertionError("the network was reached for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch; from framer.metrics import METRICS, available, score
assert [row["metric"] for row in available() if row["present"]] == ["psnr", "ssim"]
image = torch.rand(1, 3, 200, 200); scores = score(image, image, None)
assert set(scores.missing) == set(METRICS) - {"psnr", "ssim"}, scores.missing
assert all(why.startswith("not available: ") and "which goes into" in why for why in scores.missing.values()), scores.missing
import pathlib; file = pathlib.Path(torch.hub.get_dir()) / "pyiqa" / "niqe_modelparameters.mat"; file.parent.mkdir(parents=True, exist_ok=True); file.write_bytes(b"cut short")
scores = score(image, image, None); assert "checksum is wrong" in scores.missing["niqe"], scores.missing
assert set(scores.means) == {"psnr", "ssim"}"""
    env = {**{k: v for k, v in os.environ.items() if k != "FRAMER_METRIC_WEIGHTS"}, "TORCH_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr


def test_import_needs_torch_alone():
    code = "import sys; import framer.metrics; assert not {'pyiqa', 'torchvision', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
