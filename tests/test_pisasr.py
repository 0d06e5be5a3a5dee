"PiSA-SR: who trains in which stage, what stays as it was, merging, sizes, precisions, files, and FRAMER on it in both stages."
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft"); diffusers = pytest.importorskip("diffusers")

from framer.autoencoder import load_autoencoder  # noqa: E402
from framer.distill import Framer, FramerConfig  # noqa: E402
from framer.hooks import find_taps, hooks_left, unet_layers  # noqa: E402
from framer.pisasr import ADAPTERS, PiSAConfig, PiSASR, WordVectors, plain_unet, tiny_pisasr, using  # noqa: E402

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT.parent / "shared" / "data" / "metric-weights"
STAGES = dict(pixel=0, semantic=4000)


def edges(x, y): return (x.diff(dim=-1) - y.diff(dim=-1)).abs().mean((1, 2, 3))


VAE = load_autoencoder(4)


def small_unet(seed=0):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), use_linear_projection=True)


def make(stage="pixel", awake=True, seed=0, **options):
    "A small backbone with the published settings, its B matrices away from zero so that both adapters matter."
    backbone = PiSASR(small_unet(seed), vae=VAE, text=WordVectors(8), config=PiSAConfig(**{"lpips_weight": 2.0, **options}), perceptual=edges, seed=seed)
    if awake:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for n, p in backbone.unet.named_parameters():
                if "lora_B" in n: p.normal_(std=0.05, generator=generator)
    return backbone.enter(stage)


def batch(b=2, h=32, w=48, seed=1):
    g = torch.Generator().manual_seed(seed)
    return dict(hr=torch.rand(b, 3, h, w, generator=g), lr=torch.rand(b, 3, h // 4, w // 4, generator=g), caption=["a house by a lake", None, "trees", ""][:b])


def loss_of(backbone, seed=0, **size):
    return backbone.training_loss(batch(**size), torch.Generator().manual_seed(seed), "cpu", STAGES[backbone.stage])


def snapshot(backbone): return {n: p.detach().clone() for n, p in backbone.unet.named_parameters()}


def group(name): return next((a for a in ADAPTERS if f".{a}." in name), "base")


# -- stages

@pytest.mark.parametrize("stage", ADAPTERS)
def test_gradients_reach_the_stage_and_nothing_else(stage):
    backbone = make(stage, text_drop=0.0)
    loss, parts = loss_of(backbone)
    loss.backward()
    got = {n for n, p in backbone.unet.named_parameters() if p.grad is not None}
    assert got == {n for n, _ in backbone.unet.named_parameters() if f".{stage}." in n}
    dead = [n for n in got if not backbone.unet.get_parameter(n).grad.abs().max() > 0]
    assert dead == [n for n in dead if ".attn2.to_q." in n or ".attn2.to_k." in n], "one text token: softmax over it is 1, so only q and k of cross-attention have no say"
    assert all(p.grad is None for p in backbone.vae.parameters())
    assert not any(v.requires_grad for v in parts.values()) and set(parts) == {"l2", "lpips", "csd"}
    assert (parts["csd"] > 0) == (parts["lpips"] > 0) == (stage == "semantic")


@pytest.mark.parametrize("one_optimiser", [False, True], ids=["optimiser per stage", "one optimiser for both"])
def test_what_is_frozen_keeps_its_bytes(one_optimiser):
    "AdamW with decay and momentum: the base never moves, and the pixel adapter not in the semantic stage."
    backbone = make(pixel_steps=3, semantic_steps=3)
    lora = [p for n, p in backbone.unet.named_parameters() if "lora_" in n]
    before, optimizer = snapshot(backbone), torch.optim.AdamW(lora, lr=1e-2, weight_decay=0.1)
    for step in range(6):
        if step in (0, 3):
            backbone.enter(backbone.stage_at(step)); held = snapshot(backbone)
            if not one_optimiser: optimizer = torch.optim.AdamW(backbone.trainable_parameters(), lr=1e-2, weight_decay=0.1)
        loss, _ = backbone.training_loss(batch(), torch.Generator().manual_seed(step), "cpu", step)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        moved = {group(n) for n, p in backbone.unet.named_parameters() if not torch.equal(p, held[n])}
        assert moved == {backbone.stage}, f"step {step}"
    if not one_optimiser: assert {id(p) for p in optimizer.state} == {id(p) for n, p in backbone.unet.named_parameters() if ".semantic." in n}
    assert all(torch.equal(p, before[n]) for n, p in backbone.unet.named_parameters() if group(n) == "base")


def test_a_gradient_of_the_pixel_stage_does_not_survive_it():
    backbone = make("pixel")
    loss_of(backbone)[0].backward()
    backbone.enter("semantic")
    assert all(p.grad is None for n, p in backbone.unet.named_parameters() if ".semantic." not in n)


def test_the_pixel_stage_does_no_work_of_the_semantic_stage():
    def never(*args): raise AssertionError("called in the pixel stage")
    backbone = make("pixel"); backbone.perceptual, backbone.prior = never, never
    calls = []; backbone.unet.register_forward_pre_hook(lambda m, a: calls.append(torch.is_grad_enabled()))
    loss, parts = loss_of(backbone)
    assert calls == [True] and torch.equal(loss.detach(), parts["l2"])
    backbone = make("semantic", lpips_weight=0.0, csd_weight=0.0); backbone.perceptual, backbone.prior = never, never
    assert float(loss_of(backbone)[1]["csd"]) == 0


def test_frozen_score_is_the_base_and_wakes_nothing():
    backbone = make("semantic")
    base = small_unet()
    flags = [(n, p.requires_grad) for n, p in backbone.unet.named_parameters()]
    noisy, t = torch.randn(2, 4, 4, 6), torch.tensor([30, 400])
    negative, positive = backbone.frozen_score(["a house", "a tree"])(noisy, t)
    with torch.no_grad(): expected = base(noisy, t, backbone.embed(["a house", "a tree"])).sample
    torch.testing.assert_close(positive, expected); assert (negative - positive).abs().max() > 1e-4
    assert flags == [(n, p.requires_grad) for n, p in backbone.unet.named_parameters()] and backbone.unet.active_adapters() == list(ADAPTERS)


def test_a_prior_of_its_own_takes_the_place_of_the_base():
    seen = []
    class Prior(torch.nn.Module):
        def forward(self, x, t, text): seen.append((x.shape[0], torch.is_grad_enabled())); return diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput(sample=x * text.mean())
    backbone = make("semantic"); backbone.prior = Prior()
    loss_of(backbone)[0].backward()
    assert seen == [(4, False)]


def test_switching_restores_even_after_an_error():
    backbone = make("semantic")
    flags = [p.requires_grad for p in backbone.unet.parameters()]
    with pytest.raises(KeyError), using(backbone.unet, []): raise KeyError
    with pytest.raises(ValueError), using(backbone.unet, ["no such"]): pass
    assert flags == [p.requires_grad for p in backbone.unet.parameters()] and backbone.unet.active_adapters() == list(ADAPTERS)
    with torch.no_grad():
        c = backbone.condition(torch.rand(1, 3, 8, 8), (32, 32))
        on = backbone.predict(c["lr_latents"], 1, c)
        with using(backbone.unet, []): off = backbone.predict(c["lr_latents"], 1, c)
    assert (on - off).abs().max() > 1e-3


# -- the step

@pytest.mark.parametrize("stage", ADAPTERS)
def test_at_step_0_the_model_is_its_base(stage):
    backbone, base = make(stage, awake=False), small_unet()
    x, text = torch.randn(2, 4, 4, 6), torch.randn(2, 3, 8)
    with torch.no_grad(): torch.testing.assert_close(backbone.predict(x, 1, dict(encoder_hidden_states=text)), base(x, 1, text).sample, atol=1e-6, rtol=0)


def test_the_step_is_a_plain_residual_decoded_with_gradient():
    backbone = make(sample_posterior="never", text_drop=0.0)
    data = batch()
    loss, _ = backbone.training_loss(data, torch.Generator().manual_seed(0), "cpu", 0)
    up = F.interpolate(data["lr"], size=(32, 48), mode="bicubic").clamp(0, 1) * 2 - 1
    z = backbone.encode(up)
    eps = backbone.unet(z, 1, backbone.embed([c or "" for c in data["caption"]])).sample
    image = backbone.vae.decode((z - eps) / backbone.vae.config.scaling_factor + backbone.vae.config.shift_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(loss, F.mse_loss(image, data["hr"] * 2 - 1))
    z.requires_grad_(); backbone.decode(z).sum().backward(); assert z.grad.abs().max() > 0


def test_captions_are_dropped_per_sample_and_never_from_csd():
    seen = []
    backbone = make("semantic")
    words = WordVectors(8); backbone.text = lambda texts: (seen.append(texts), words(texts))[1]
    backbone.config.positive_prompt = "sharp"
    kinds = set()
    for seed in range(12):
        seen.clear(); loss_of(backbone, seed)
        step, negative, positive = seen
        assert positive == ["a house by a lake, sharp", "sharp"] and negative == [backbone.config.negative_prompt] * 2
        assert all(s in ("", p) for s, p in zip(step, positive)); kinds.add(tuple(s == "" for s in step))
    assert len(kinds) == 4, "each sample draws for itself"


def test_same_generator_same_loss():
    backbone = make("semantic")
    a, b, c = (float(loss_of(backbone, s)[0].detach()) for s in (0, 0, 1))
    assert a == b != c


def test_posterior_is_drawn_in_training_and_not_at_inference():
    backbone = make(text_drop=0.0)
    assert loss_of(backbone, 0)[0].item() != loss_of(backbone, 1)[0].item()
    never = make(text_drop=0.0, sample_posterior="never")
    assert loss_of(never, 0)[0].item() == loss_of(never, 1)[0].item()
    lr = torch.rand(1, 3, 8, 8)
    assert torch.equal(backbone.restore(lr), backbone.restore(lr, noise=torch.randn(1, 4, 4, 4)))
    always = make(sample_posterior="always")
    assert not torch.equal(always.restore(lr), always.restore(lr)) and torch.equal(*(always.restore(lr, noise=torch.ones(1, 4, 4, 4)) for _ in "ab"))


@pytest.mark.parametrize("stage", ADAPTERS)
def test_batch_of_one_and_any_shape(stage):
    backbone = make(stage)
    for size in (dict(b=1, h=32, w=32), dict(b=1, h=24, w=56), dict(b=3, h=40, w=32)):
        loss, _ = loss_of(backbone, **size)
        loss.backward(); assert loss.isfinite(), size


def test_restore_takes_any_size():
    backbone = make()
    for h, w in ((8, 8), (7, 12), (5, 3), (1, 1), (2, 31)):
        out = backbone.restore(torch.rand(2, 3, h, w))
        assert out.shape == (2, 3, 4 * h, 4 * w) and 0 <= out.min() and out.max() <= 1 and not out.requires_grad


@pytest.mark.parametrize("stage", ADAPTERS)
def test_bf16_base_keeps_adapters_and_losses_in_float32(stage):
    backbone = make(stage); reference = float(loss_of(backbone)[0].detach())
    backbone.to("cpu", dtype=torch.bfloat16)
    assert {p.dtype for n, p in backbone.unet.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in backbone.unet.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    loss, _ = loss_of(backbone); loss.backward()
    assert loss.dtype == torch.float32 and abs(float(loss.detach()) - reference) < 0.1 * reference
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in backbone.trainable_parameters())
    assert backbone.restore(torch.rand(1, 3, 8, 8)).dtype == torch.float32
    with pytest.raises(ValueError, match="trainable='all'"): tiny_pisasr().to("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("stage", ADAPTERS)
def test_bf16_autocast(stage):
    backbone = make(stage)
    with torch.autocast("cpu", torch.bfloat16): loss, _ = loss_of(backbone)
    loss.backward(); assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in backbone.unet.parameters())


@pytest.mark.parametrize("stage", ADAPTERS)
def test_gradient_checkpointing_changes_nothing(stage):
    grads = []
    for on in (False, True):
        backbone = make(stage)
        if on: backbone.unet.enable_gradient_checkpointing()
        with Framer.attach(backbone.unet) as framer:
            loss, _ = loss_of(backbone); (loss + framer.loss()).backward()
        grads.append([p.grad for p in backbone.trainable_parameters()])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


# -- adjustable and merged

def test_merge_equals_two_passes_at_lambda_1():
    backbone = make("semantic"); lr = torch.rand(2, 3, 8, 12)
    c = backbone.condition(lr, (32, 48)); z = c["lr_latents"]
    with torch.no_grad():
        with using(backbone.unet, ["pixel"]): pixel = backbone.predict(z, 1, c)
        both = backbone.predict(z, 1, c)
        two = 1.0 * pixel + 1.0 * (both - pixel)
    for lp, ls in ((0.3, 1.7), (1, 0), (0, 1), (1.2, 1.2)):
        with torch.no_grad(): torch.testing.assert_close(backbone.adjusted(z, 1, c, lp, ls), lp * pixel + ls * (both - pixel), rtol=1e-4, atol=1e-5)
    assert (both - pixel).abs().max() > 1e-2, "the semantic adapter says something"
    plain = diffusers.UNet2DConditionModel.from_config(backbone.unet.config)
    backbone.merge()
    assert set(backbone.unet.state_dict()) == set(plain.state_dict()) and not any("lora" in n for n, _ in backbone.unet.named_modules())
    with torch.no_grad(): torch.testing.assert_close(backbone.adjusted(z, 1, c), two, rtol=1e-4, atol=1e-5)
    assert backbone.merge().merged and backbone.trainable_parameters() == []
    with pytest.raises(RuntimeError, match="merged"): loss_of(backbone)


def test_restore_does_not_depend_on_the_stage():
    lr = torch.rand(1, 3, 8, 8)
    assert torch.equal(make("pixel").restore(lr), make("semantic").restore(lr))


# -- FRAMER

@pytest.mark.parametrize("stage", ADAPTERS)
def test_framer_records_one_pass_and_teaches_the_stages_adapter(stage):
    backbone = make(stage)
    plain = small_unet()
    assert find_taps(backbone.unet).names == unet_layers(plain) and find_taps(backbone.unet).channels == find_taps(plain).channels
    forwards = []; backbone.unet.down_blocks[0].attentions[0].register_forward_hook(lambda *a: forwards.append(torch.is_grad_enabled()))
    framer = Framer.attach(backbone.unet, FramerConfig(weight=1.0))
    loss, _ = loss_of(backbone)
    recorded = framer.recorder.done
    assert forwards == ([True] if stage == "pixel" else [True, False])
    assert len(recorded) == len(framer.taps.names) and all(k.map.shape[0] == 2 for k in recorded), "the pass of the step, not CSD's"
    term = framer.loss()
    assert term.requires_grad and len(framer.terms.layers) == len(unet_layers(plain)) - 1
    term.backward()
    got = {group(n) for n, p in backbone.unet.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert got == {stage}
    assert all(p.grad is not None for p in framer.parameters())
    framer.detach(); assert hooks_left(backbone.unet) == 0


def test_both_stages_with_framer_from_end_to_end(tmp_path):
    backbone = tiny_pisasr(pixel_steps=3, semantic_steps=3, lpips_weight=1.0, csd_weight=0.01, perceptual=edges)
    framer, layers = Framer.attach(backbone.unet), []
    data = batch(h=32, w=32)
    for step in range(6):
        if step in (0, 3): optimizer = torch.optim.AdamW([*backbone.enter(backbone.stage_at(step)).trainable_parameters(), *framer.parameters()], lr=1e-3)
        loss, _ = backbone.training_loss(data, torch.Generator().manual_seed(step), "cpu", step)
        (loss + framer.loss()).backward(); optimizer.step(); optimizer.zero_grad(); layers.append(len(framer.terms.layers))
    framer.detach(); assert set(layers) == {len(unet_layers(backbone.unet)) - 1}
    backbone.save_pretrained(tmp_path / "model")
    plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model")
    assert set(plain.state_dict()) == set(diffusers.UNet2DConditionModel.from_config(plain.config).state_dict())
    lr = data["lr"]; again = PiSASR.from_pretrained(tmp_path / "model", backbone.vae, backbone.text)
    assert again.config == backbone.config and not again.unet.training
    for lambdas in ((1, 1), (0.5, 1.5)): torch.testing.assert_close(again.restore(lr, None, 1, 1.0, *lambdas), backbone.restore(lr, None, 1, 1.0, *lambdas), atol=1e-5, rtol=0)


def test_wrapped_by_accelerate_and_compiled_names():
    accelerate = pytest.importorskip("accelerate")
    backbone = make("semantic"); inner = backbone.unet
    backbone.model = accelerate.Accelerator(cpu=True).prepare(torch.nn.DataParallel(inner) if torch.cuda.device_count() > 1 else inner)
    class Wrapper(torch.nn.Module):
        def __init__(self, module): super().__init__(); self.module = module
        def forward(self, *a, **k): return self.module(*a, **k)
    backbone.model = Wrapper(backbone.model)
    assert plain_unet(backbone.model) is inner
    loss_of(backbone)[0].backward(); assert {group(n) for n, p in inner.named_parameters() if p.grad is not None} == {"semantic"}


# -- bad input, files, weights

@pytest.mark.parametrize("make_it, message", [
    (lambda: PiSASR(diffusers.UNet2DConditionModel(**{**small_unet().config, "in_channels": 8})), "takes 8 channels and gives 4"),
    (lambda: make().restore(torch.rand(3, 8, 8)), r"expected \(B, 3, h, w\)"),
    (lambda: make().restore(torch.rand(1, 3, 8, 8), strength=0.5), "strength=0.5"),
    (lambda: make().condition(torch.rand(1, 3, 8, 8), (30, 32)), "multiples of 8"),
    (lambda: make().training_loss(batch(), torch.Generator(), "cpu", 4000), "belongs to the semantic stage"),
    (lambda: PiSAConfig(text_drop=2), "probability"),
    (lambda: PiSAConfig(pixel_steps=0, semantic_steps=0), "at least one step"),
], ids=range(7))
def test_bad_input_is_named(make_it, message):
    with pytest.raises((ValueError, RuntimeError), match=message): make_it()


def test_an_incomplete_folder_is_named(tmp_path):
    backbone = make(); backbone.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"; whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"): PiSASR.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be read"): PiSASR.from_pretrained(tmp_path)
    weights.write_bytes(whole); config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_out_channels": [16, 16]}))
    with pytest.raises(ValueError, match=str(tmp_path)): PiSASR.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    backbone = make(); backbone.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(*a, **k): raise OSError("disk full")
    monkeypatch.setattr("framer.pisasr.save_file", full)
    with pytest.raises(OSError, match="disk full"): make("semantic", seed=1).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="disk full"): backbone.save_adapters(tmp_path / "adapters.safetensors")
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.skipif(not (WEIGHTS / "hub/checkpoints/vgg16-397923af.pth").is_file(), reason=f"LPIPS needs its weights below {WEIGHTS}")
def test_lpips_with_its_real_weights():
    pytest.importorskip("pyiqa")
    code = """
import sys, torch
from framer.metrics import Scorer
from framer.pisasr import lpips_vgg
torch.manual_seed(0)
loss = lpips_vgg(weights=sys.argv[1])
assert not any(p.requires_grad for p in loss.parameters())
x = torch.rand(2, 3, 64, 64) * 2 - 1; y = (x * 0.5).requires_grad_()
value = loss(y, x); value.mean().backward()
assert value.shape == (2,) and 0.01 < value.min() and y.grad.abs().max() > 0, value
assert loss(x, x).abs().max() < 1e-6
scores = Scorer(("lpips",), "framer", weights=sys.argv[1])((y.detach() + 1) / 2, (x + 1) / 2)
assert torch.allclose(torch.tensor([s["lpips"] for s in scores], dtype=torch.float32), value.detach(), atol=1e-5), (scores, value)
flat = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
loss(flat, x[:1]).sum().backward(); assert flat.grad.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(WEIGHTS)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
