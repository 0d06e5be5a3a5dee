"What FRAMER leaves behind: the baseline's keys and cost; pictures of any size in tiles; half precision; the notebook on a folder."
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from framer.autoencoder import load_autoencoder
from framer.backbones import ONE_STEP, RECIPES, load_backbone, save_backbone
from framer.distill import Framer
from framer.pipelines import PiSASRPipeline, pipeline_of
from framer.sampling import Sampling, TiledAutoencoder, enlarge, load_trained
from framer.scales import tiny_text

ROOT = Path(__file__).parents[1]
EVERY = [(n, r) for n in RECIPES for r in RECIPES[n]]
every = pytest.mark.parametrize("name, recipe", EVERY, ids=lambda x: x)


def trained(name, recipe, framer):
    "One step of training, saved as a run saves it."
    torch.manual_seed(0)
    backbone = load_backbone(name, scale="tiny", recipe=recipe)
    backbone.enter(backbone.stage_at(0))
    for p in backbone.trainable_parameters(): torch.nn.init.normal_(p, std=0.02)
    method = Framer.attach(backbone.model) if framer else None
    optimizer = torch.optim.AdamW([*backbone.trainable_parameters(), *(method.parameters() if method else [])], lr=1e-3)
    batch = dict(hr=torch.rand(2, 3, 64, 96), lr=torch.rand(2, 3, 16, 24))                # not square
    loss, _ = backbone.training_loss(batch, torch.Generator().manual_seed(0), "cpu")
    (loss + method.loss() if method else loss).backward(); optimizer.step()
    if method: method.detach()
    return backbone


@every
def test_framer_leaves_the_baselines_keys_and_cost(name, recipe, tmp_path):
    found = {}
    for framer in (True, False):
        folder = tmp_path / str(framer)
        save_backbone(trained(name, recipe, framer), folder)
        keys = {k: v.shape for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        loaded = load_trained(folder)
        with FlopCounterMode(display=False) as flops: enlarge(loaded, torch.rand(3, 16, 24), Sampling(steps=None if recipe in ONE_STEP else 2))
        found[framer] = keys, flops.get_total_flops(), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())
    assert found[True] == found[False] and found[True][1] > 0 and found[True][2] == 0


@every
def test_one_picture_and_bf16(name, recipe):
    "A batch of one, not square, in bfloat16: a training step with finite gradients, and a picture near that of float32."
    backbone = load_backbone(name, scale="tiny", recipe=recipe)
    backbone.enter(backbone.stage_at(0))
    for p in backbone.trainable_parameters(): torch.nn.init.normal_(p, std=0.02)
    with Framer.attach(backbone.model) as framer, torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="batch of one"):
        loss, _ = backbone.training_loss(dict(hr=torch.rand(1, 3, 96, 64), lr=torch.rand(1, 3, 24, 16)), torch.Generator().manual_seed(0), "cpu")
        (loss + framer.loss()).backward()
    assert all(p.grad.isfinite().all() for p in backbone.trainable_parameters() if p.grad is not None)
    assert sum(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.trainable_parameters()) > 10


class Blocks:
    "A codec without memory: 8x8 blocks become channels' means and come back flat."
    config, dtype = SimpleNamespace(block_out_channels=(1, 1, 1, 1), scaling_factor=1.0, shift_factor=0.0), torch.float32
    def encode(self, x): z = torch.nn.functional.avg_pool2d(x, 8); return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([z, torch.zeros_like(z)], 1), mode=lambda: z))
    def decode(self, z): return SimpleNamespace(sample=z.repeat_interleave(8, -1).repeat_interleave(8, -2))


def test_tiled_codec_is_the_codec_for_40_sizes():
    draw = random.Random(1)
    for _ in range(40):
        h, w, tile = 8 * draw.randint(1, 40), 8 * draw.randint(1, 40), 8 * draw.randint(2, 20)
        codec, overlap = Blocks(), 8 * draw.randint(0, tile // 8 - 1)
        x = torch.randn(1, 3, h, w); z = codec.encode(x).latent_dist.mode()
        tiled = TiledAutoencoder(codec, tile, overlap)
        assert torch.equal(tiled.encode(x).latent_dist.mode(), z) and torch.equal(tiled.decode(z).sample, codec.decode(z).sample), (h, w, tile, overlap)


@every
def test_tiles_of_a_model_that_sees_no_neighbours_leave_no_seam(name, recipe):
    "With a prediction that depends on the place alone, tiles change nothing, for sizes below and above a tile."
    backbone = load_backbone(name, scale="tiny", recipe=recipe)
    backbone.predict = lambda latents, timesteps, condition, *more: 0.1 * latents + 0.2 * condition["lr_latents"]
    steps = None if recipe in ONE_STEP else 2
    for size in [(9, 70), (40, 40), (16, 33)]:
        x = torch.rand(3, *size)
        one, tiles = (enlarge(backbone, x, Sampling(steps=steps, tile=tile, overlap=8)) for tile in (160, 24))
        assert (one - tiles).abs().max() < 1e-5, size


@every
def test_pipeline_folders_are_plain(name, recipe, tmp_path):
    pipeline = pipeline_of(load_backbone(name, scale="tiny", recipe=recipe))
    pipeline.save_pretrained(tmp_path)
    assert isinstance(AutoencoderKL.from_pretrained(tmp_path / "vae"), AutoencoderKL)
    if name == "sd2": assert UNet2DConditionModel.from_pretrained(tmp_path / "unet").config.in_channels == (8 if recipe == "algorithm-1" else 4)
    again = load_trained(tmp_path)                                                        # the same folder serves `upscale`
    assert again.recipe == recipe or recipe == "framer-u" and again.recipe == "framer-u"
    picture = Image.new("RGBA", (11, 30), (10, 200, 90, 60))
    made = type(pipeline).from_pretrained(tmp_path)(picture, num_inference_steps=None if recipe in ONE_STEP else 2).images[0]
    assert made.size == (44, 120) and made.mode == "RGBA"


def test_lambda_is_the_adapters_strength(tmp_path):
    "lambda 1, 1 in two passes is the merged model in one."
    backbone = load_backbone("sd2", scale="tiny", recipe="framer-u", text=tiny_text("sd2"))
    for p in backbone.model.parameters(): torch.nn.init.normal_(p, std=0.02)
    pipeline_of(backbone).save_pretrained(tmp_path)
    picture = torch.rand(3, 16, 16)
    adjustable = PiSASRPipeline.from_pretrained(tmp_path)
    (tmp_path / "unet" / "adapters.safetensors").unlink()
    a, b = (enlarge(p.backbone, picture, Sampling(color_fix=None), caption="a wall") for p in (adjustable, PiSASRPipeline.from_pretrained(tmp_path)))
    assert (a - b).abs().max() < 1e-4


def test_upscale_notebook_takes_a_folder(tmp_path):
    save_backbone(load_backbone("sd2", scale="tiny", recipe="framer-u"), tmp_path / "reports" / "u" / "model")
    (tmp_path / "small" / "deep").mkdir(parents=True)
    Image.new("L", (10, 12), 77).save(tmp_path / "small" / "deep" / "grey.png"); Image.new("RGB", (9, 9)).save(tmp_path / "small" / "a.jpg"); (tmp_path / "small" / "bad.png").write_text("no")
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/upscale.ipynb"), str(tmp_path / "out.ipynb"), "-k", "python3", "--no-progress-bar", "-p", "image", str(tmp_path / "small"), "-p", "run", "u", "-p", "out", str(tmp_path / "big")]
    env = dict(os.environ, FRAMER_ROOT=str(tmp_path), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with Image.open(tmp_path / "big" / "deep" / "grey.png") as grey: assert (grey.mode, grey.size) == ("L", (40, 48)) and grey.text["framer:recipe"] == "framer-u"
    assert (tmp_path / "big" / "a.png").exists() and "bad.png" in (tmp_path / "out.ipynb").read_text()
