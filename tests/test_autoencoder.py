"The weights that come with the package, and the notebook that made them."
import json
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
from framer.autoencoder import decode, encode, load_autoencoder, read_picture
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "framer" / "weights"


@pytest.mark.parametrize("channels", [4, 16])
def test_bundled_weights(channels):
    folder = WEIGHTS / f"autoencoder-{channels}ch"
    file = folder / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size < 5e6
    with safe_open(file, "pt") as f: assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.float16}
    config = json.loads((folder / "config.json").read_text())
    assert config["latent_channels"] == channels and config["_class_name"] == "AutoencoderKL"
    card = (folder / "README.md").read_text()
    for wanted in ("Held-out PSNR", "Budget", "Limits", "Licence", "commit"): assert wanted in card
    vae = load_autoencoder(channels)
    photographs = sorted((ROOT / "data/photographs/val").glob("*.jpg"))
    z = torch.cat([encode(vae, read_picture(p)[None, :, :512, :512].float() / 127.5 - 1).flatten() for p in photographs])
    assert abs(z.mean()) < 0.3 and 0.6 < z.std() < 1.6  # near zero mean and unit variance on photographs never trained on


def test_decoding_512_takes_less_than_two_seconds_on_one_core():
    vae, threads = load_autoencoder(4), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            decode(vae, torch.randn(1, 4, 64, 64))
            start = time.process_time()
            decode(vae, torch.randn(1, 4, 64, 64))
            assert time.process_time() - start < 2
    finally: torch.set_num_threads(threads)


def test_diffusers_own_loader_reads_the_bundled_weights():
    from diffusers import AutoencoderKL
    a, b = AutoencoderKL.from_pretrained(WEIGHTS / "autoencoder-16ch").float(), load_autoencoder(16)
    for k, v in b.state_dict().items(): assert torch.equal(a.state_dict()[k], v), k


def test_the_training_notebook_runs_and_goes_on(tmp_path):
    papermill = pytest.importorskip("papermill")
    from PIL import Image
    for part, n in (("train", 2), ("val", 1)):
        (tmp_path / part).mkdir()
        for k in range(n): Image.effect_noise((96, 88), 50).convert("RGB").save(tmp_path / part / f"{part}{k}.png")
    parameters = dict(latent_channels=4, steps=2, crop=32, batch_size=2, every=1, data=str(tmp_path / "train"), holdout=str(tmp_path / "val"), out=str(tmp_path / "out"))
    said = []
    for again in range(2):
        notebook = papermill.execute_notebook(ROOT / "nbs/train_autoencoder.ipynb", tmp_path / f"{again}.ipynb", parameters=parameters, cwd=ROOT / "nbs", progress_bar=False)
        said.append("".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])))
    assert "held-out PSNR" in said[0] and "going on from step" not in said[0] and "going on from step 2" in said[1]
    load_autoencoder(4, tmp_path / "out/weights")
    assert not list((tmp_path / "out").glob("*.writing"))
