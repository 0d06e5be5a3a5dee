"The small pretrained models, and the notebooks that make and compare them."
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from framer.backbones import load_backbone
from framer.datasets import degraded_pair
from framer.hooks import hooks_left
from framer.metrics import Scorer
from framer.photographs import load_photograph
from framer.runs import history_differences, read_history
from framer.sampling import upscale
from framer.scales import MODEL_PART, small_folder
from framer.small import SmallConfig, base_config, finished, train_small
from framer.training import TrainConfig, train
from test_evaluation import weights  # a fixture

ROOT = Path(__file__).parents[1]
FAMILIES = ("sd2", "sd3")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    for path in sorted((ROOT / "data/photographs/val").glob("*.jpg"))[:2]: shutil.copy(path, folder)
    return folder


# -- the weights

@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_small_and_say_what_they_are(family):
    folder = small_folder(family)
    assert all(p.stat().st_size <= 16_000_000 for p in folder.rglob("*.safetensors"))
    card = (folder / "README.md").read_text()
    for word in ("Data", "Budget", "Commit", "RealSR", "Limits", "Licence", "pictures"): assert word.lower() in card.lower(), word
    backbone = load_backbone(family, weights="small")
    assert backbone.recipe == "one-step" and sum(p.numel() for p in backbone.model.parameters()) <= 8_000_000 and hooks_left(backbone.model) == 0
    assert json.loads((folder / MODEL_PART[family] / "config.json").read_text())["_class_name"] == type(backbone.model).__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_enlarges_better_than_bicubic(family, weights):
    "Photographs that were never trained on, degraded: nearer to the original in LPIPS, every one of them."
    backbone, scorer = load_backbone(family, weights="small"), Scorer(("lpips",), "seesr-y", weights=weights)
    for k, path in enumerate(sorted((ROOT / "data/photographs/val").glob("*.jpg"))[::2]):
        photograph = load_photograph(path); top, left = ((n - 256) // 2 for n in photograph.shape[-2:])
        hr, lr = (x[None] for x in degraded_pair(photograph[:, top: top + 256, left: left + 256], "seesr_strong", seed=2 * k))
        plain, made = (scorer(x, hr)[0]["lpips"] for x in (F.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1), backbone.restore(lr)))
        assert made < 0.9 * plain, (path.name, made, plain)


def test_upscale_starts_from_them():
    a, b = (upscale(Image.new("RGB", (30, 21), (200, 100, 50))) for _ in range(2))
    assert a.size == (120, 84) and a.tobytes() == b.tobytes()
    assert upscale(Image.new("RGB", (16, 16), (200, 100, 50)), "small-sd3").size == (64, 64)


def test_scale_full_and_small_weights_do_not_go_together():
    with pytest.raises(ValueError, match="small models are tiny"): load_backbone("sd2", scale="full", weights="small")


def test_training_goes_on_from_them(held_out, tmp_path):
    config = TrainConfig(weights="small", steps=0, learning_rate=0.0)
    assert (config.steps, config.learning_rate) == (150, 2e-4) and (TrainConfig(weights="random", steps=0).steps, TrainConfig(weights="random", learning_rate=0.0).learning_rate) == (600, 1.5e-3)
    quick = dict(size=64, batch_size=2, validation_size=64, num_workers=0, tensorboard=False, steps=1, validation_data=str(held_out), recipe_options=dict(lpips_weight=0.0))
    rows = read_history(train(TrainConfig(weights="small", run=str(tmp_path / "a"), **quick), log=lambda *a: None))
    new = read_history(train(TrainConfig(weights="random", recipe="one-step", run=str(tmp_path / "b"), **quick), log=lambda *a: None))
    assert rows[0]["latent"] < new[0]["latent"]


# -- the plan

QUICK = dict(arms={"baseline": None, "framer": {}}, decoder_minutes=0.0, latent_steps=1, base_steps=3, base_minutes=0.0, second_minutes=0.0, arm_steps=2, size=64, batch_size=2, mixed_precision="no", lpips_weight=0.0)


def test_slices_end_where_one_call_ends(held_out, tmp_path, monkeypatch):
    whole, sliced = (SmallConfig(group=str(tmp_path / name), validation_data=str(held_out), **QUICK) for name in ("whole", "sliced"))
    assert train_small(whole, log=lambda *a: None) == []
    paused = train(replace(base_config(sliced), slice_minutes=1e-6), log=lambda *a: None)           # pauses after its first step
    assert len(read_history(paused)) == 1 and not finished(base_config(sliced))
    assert train_small(sliced, log=lambda *a: None) == []
    for run in ("sd2", "sd2-framer-0"): assert history_differences(read_history(tmp_path / "whole" / run), read_history(tmp_path / "sliced" / run)) == []


def test_decoder_goes_on_and_keeps_its_latents(tmp_path):
    "In slices of a step; its checkpoints are small files, and the encoder stays as it was."
    from framer.autoencoder import encode, load_autoencoder
    from framer.small import decoder_folder, sharpen_decoder
    config, said = SmallConfig(group=str(tmp_path / "d"), batch_size=2, decoder_minutes=0.05, lpips_weight=0.0), []
    for _ in range(400):
        if sharpen_decoder(config, until=0.0 if not said else float("inf"), log=said.append): break
        said.append("paused")
        assert max(p.stat().st_size for p in decoder_folder(config).rglob("*.safetensors")) <= 16_000_000
    assert any("going on from step" in line for line in said)
    old, new, x = load_autoencoder(4), load_autoencoder(4, decoder_folder(config) / "weights"), torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(encode(old, x), encode(new, x), atol=2e-3) and any((a != b).any() for a, b in zip(old.decoder.parameters(), new.decoder.parameters()))


def test_checkpoints_are_cut_into_small_files(held_out, tmp_path):
    config = SmallConfig(group=str(tmp_path / "cut"), validation_data=str(held_out), **{**QUICK, "arms": {"baseline": None}})
    train_small(config, log=lambda *a: None)
    files = list((tmp_path / "cut").rglob("checkpoints/*/*.safetensors"))
    assert len(files) > 8 and max(p.stat().st_size for p in files) <= 16_000_000


def test_notebooks(held_out, tmp_path):
    "pretrain, then small_models on what it made."
    (tmp_path / "data").symlink_to(ROOT / "data")
    env = dict(os.environ, FRAMER_ROOT=str(tmp_path), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    def papermill(notebook, parameters):
        command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / notebook), str(tmp_path / notebook), "-k", "python3", "--no-progress-bar", "-y", json.dumps(parameters)]
        done = subprocess.run(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    papermill("pretrain.ipynb", dict(QUICK, backbone="sd3", validation_data=str(held_out), group="small"))
    papermill("small_models.ipynb", dict(backbones=["sd3"], arms=["baseline", "framer"], metrics=["psnr"], framer_metrics=["psnr"], quick_metrics=["psnr"], mark_metrics=["psnr"]))
    found = json.loads((tmp_path / "reports/small/comparison.json").read_text())
    assert [d["metric"] for d in found["differences"]] == ["psnr"] and all(d["n"] == 6 for d in found["differences"])
    assert {r["arm"] for r in found["tables"]["sd3"]["seesr-y, all metrics"]} == {"baseline", "framer"} and found["yardsticks"]["autoencoder-16ch"]["means"]["psnr"] > found["yardsticks"]["bicubic"]["means"]["psnr"]
    for file in ("comparison.md", "scores/held-out.csv", "differences.png", "similarity-sd3.png", "pictures-sd3.png"): assert (tmp_path / "reports/small" / file).is_file(), file
