"The parameterised notebooks, run by papermill as a person would."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
QUICK = dict(weights="random", steps=3, learning_rate=1.5e-3, size=64, batch_size=2, validation_size=64, sampling_steps=2, num_workers=0, log_layers_every=1, checkpoint_every=2, tensorboard=False)


def papermill(notebook, output, cwd, root=ROOT, **parameters):
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / notebook), str(output), "-k", "python3", "--no-progress-bar"]
    for k, v in parameters.items(): command += ["-p", k, str(v)]
    env = dict(os.environ, FRAMER_ROOT=str(root), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A project folder of its own: reports go there, photographs come from the repository."
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").symlink_to(ROOT / "data")
    return folder


@pytest.mark.parametrize("backbone, framer", [("sd2", True), ("sd2", False), ("sd3", True), ("sd3", False)])
def test_train_notebook(backbone, framer, root, tmp_path):
    name = f"{backbone}-{'framer' if framer else 'baseline'}"
    done = papermill("train.ipynb", root / "reports" / name / "train.ipynb", tmp_path, root, backbone=backbone, framer=framer, run=name, **QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    run = root / "reports" / name
    for file in ("config.json", "history.csv", "metrics.json", "validation.csv", "figures/loss.png", "figures/similarity.png", "figures/validation-000003.png", "model/config.json"):
        assert (run / file).is_file(), file
    metrics = json.loads((run / "metrics.json").read_text())
    assert {r["timestep"] for r in metrics["similarity"]} == {300, 700} and metrics["noise_loss"]["last"] > 0
    html = subprocess.run([sys.executable, "-m", "framer.report", str(run / "train.ipynb")], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert html.returncode == 0, html.stderr
    text = (run / "train.html").read_text()
    assert "data:image/png;base64" in text and '<script src="http' not in text and 'href="http' not in text.split("</head>")[0]


def test_compare_and_upscale_notebooks(root, tmp_path):
    "After the runs above."
    if not (root / "reports/sd3-baseline/metrics.json").exists(): pytest.skip("needs the runs of test_train_notebook")
    output = tmp_path / "compare.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/compare.ipynb"), str(output), "-k", "python3", "--no-progress-bar", "-y", "pairs: {sd2: [sd2-baseline, sd2-framer], sd3: [sd3-baseline, sd3-framer]}"]
    done = subprocess.run(command, cwd=tmp_path, env=dict(os.environ, FRAMER_ROOT=str(root), PYTHONPATH=str(ROOT)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    Image.new("RGBA", (20, 30), (200, 100, 50, 128)).save(tmp_path / "small.png")
    done = papermill("upscale.ipynb", tmp_path / "upscale.ipynb", tmp_path, root, image=tmp_path / "small.png", run="sd3-framer", out=tmp_path / "big.png", steps=2)
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(tmp_path / "big.png") as big: assert big.size == (80, 120) and big.mode == "RGBA" and big.text["framer:run"] == "sd3-framer"


@pytest.mark.parametrize("parameters, words", [(dict(backbon="sd2"), "did you mean 'backbone'"), (dict(backbone="sd9"), "expected one of sd2, sd3"), (dict(framer="true"), "True and False")])
def test_wrong_parameter_stops_before_training(parameters, words, root, tmp_path):
    done = papermill("train.ipynb", tmp_path / "out.ipynb", tmp_path, root, run="wrong", **{**QUICK, **parameters})
    assert done.returncode == 1 and words in done.stderr + done.stdout
    assert not (root / "reports" / "wrong").exists()
