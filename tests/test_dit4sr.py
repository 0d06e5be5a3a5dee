"DiT4SR: which token hears which, what trains, what is read and written, and FRAMER on it."
import json
import warnings

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers")

from diffusers import SD3Transformer2DModel, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from framer.distill import Framer  # noqa: E402
from framer.dit4sr import (DiT4SR, ControlAttnProcessor, ControlFeedForward, DiT4SRTransformer2DModel, control_parameters, count_parameters, convert_published,  # noqa: E402
                           half_frozen, sd35_medium_config, shifted, tiny_dit4sr)
from framer.hooks import Recorder, find_taps  # noqa: E402

CONFIG = dict(sample_size=8, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
              pooled_projection_dim=12, pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0, 1))
KINDS = ("to_q_control", "to_k_control", "to_v_control", "to_out_control", "control_conv")


def awake(model, control=0.0, seed=0):
    "Modulation that matters, and control parameters as if trained."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".norm1" in n and "linear" in n: p.add_(0.4 * torch.randn(p.shape, generator=g))
            if control and "control" in n: p.add_(control * torch.randn(p.shape, generator=g))
    return model


def sd3(**more):
    torch.manual_seed(0)
    return awake(SD3Transformer2DModel(**{**CONFIG, **more}))


def dit4sr(control=0.2, legacy=False, **more):
    torch.manual_seed(0)
    return awake(DiT4SRTransformer2DModel(**{**CONFIG, "legacy": legacy, **more}), control)


def inputs(h=8, w=8, batch=2, seed=0, text=4):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return dict(hidden_states=r(batch, 16, h, w), lr_latents=r(batch, 16, h, w), encoder_hidden_states=r(batch, text, 12), pooled_projections=r(batch, 12), timestep=torch.linspace(100, 900, batch))


def predict(model, data):
    with torch.no_grad(): return model(**data).sample


# -- which token hears which

def plain_attention(attn, tokens, text, legacy):
    "The equations, one head and one sample at a time, in float64 (diffusers takes the variance of a norm in float32), without a line of the library."
    linear = lambda m, x: x @ m.weight.double().T + m.bias.double()  # noqa: E731
    rms = lambda m, x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * m.weight.double()  # noqa: E731
    n, d = tokens.shape[1] // 2, tokens.shape[2] // attn.heads
    images, texts = [], []
    for b in range(len(tokens)):
        noise, lr, heads = tokens[b, :n], tokens[b, n:], []
        for k in range(attn.heads):
            cut = slice(k * d, (k + 1) * d)
            query = [rms(attn.norm_q, linear(attn.to_q, noise)[:, cut]), rms(attn.norm_q, linear(attn.to_q_control, linear(attn.to_q, lr))[:, cut])]
            key = [rms(attn.norm_k, linear(attn.to_k, noise)[:, cut])]
            key.append(rms(attn.norm_k, key[0] if legacy else linear(attn.to_k_control, linear(attn.to_k, lr))[:, cut]))
            value = [linear(attn.to_v, noise)[:, cut], linear(attn.to_v_control, linear(attn.to_v, lr))[:, cut]]
            if text is not None:
                query.append(rms(attn.norm_added_q, linear(attn.add_q_proj, text[b])[:, cut])); key.append(rms(attn.norm_added_k, linear(attn.add_k_proj, text[b])[:, cut]))
                value.append(linear(attn.add_v_proj, text[b])[:, cut])
            query, key, value = map(torch.cat, (query, key, value))
            heads.append((query @ key.T / d ** 0.5).softmax(-1) @ value)
        out = torch.cat(heads, -1)
        images.append(torch.cat([linear(attn.to_out[0], out[:n]), linear(attn.to_out_control, out[n:2 * n] + lr)]))
        if text is not None: texts.append(out[2 * n:] if attn.context_pre_only else linear(attn.to_add_out, out[2 * n:]))
    return torch.stack(images), torch.stack(texts) if texts else None


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("which", ["joint", "joint of the last block", "second"])
def test_attention_is_the_written_equations(which, legacy):
    model = dit4sr(0.5, legacy).double()
    block = model.transformer_blocks[2 if "last" in which else 0]
    attn, g = block.attn2 if which == "second" else block.attn, torch.Generator().manual_seed(1)
    for n, p in attn.named_parameters():
        if "norm" in n: p.data += 0.3 * torch.randn(p.shape, generator=g)
    tokens, text = torch.randn(2, 10, 16, generator=g, dtype=torch.float64), torch.randn(2, 3, 16, generator=g, dtype=torch.float64)
    text = None if which == "second" else text
    found = attn(hidden_states=tokens, encoder_hidden_states=text)
    image, words = plain_attention(attn, tokens, text, legacy)
    torch.testing.assert_close(found if text is None else found[0], image, atol=1e-12, rtol=1e-10)
    if text is not None: torch.testing.assert_close(found[1], words, atol=1e-12, rtol=1e-10)


def test_feed_forward_is_the_written_equation():
    torch.manual_seed(0)
    ff, (h, w), scale = ControlFeedForward(8).double(), (3, 5), 1.2
    torch.nn.init.normal_(ff.control_conv.weight); torch.nn.init.normal_(ff.control_conv.bias)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    hidden = F.gelu(x @ ff.net[0].proj.weight.T + ff.net[0].proj.bias, approximate="tanh")
    noise, lr = hidden[:, :15], hidden[:, 15:].reshape(2, h, w, 32)
    padded, detail = F.pad(lr, (0, 0, 1, 1, 1, 1)), ff.control_conv.bias.expand(2, h, w, 32).clone()
    for dy in range(3):
        for dx in range(3): detail += padded[:, dy:dy + h, dx:dx + w] * ff.control_conv.weight[:, 0, dy, dx]
    expected = torch.cat([noise + scale * detail.reshape(2, 15, 32), hidden[:, 15:]], 1) @ ff.net[2].weight.T + ff.net[2].bias
    torch.testing.assert_close(ff(x, (h, w), scale), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_first_half_is_noise_second_half_is_lr(size):
    model, data, seen = dit4sr(), inputs(*size), []
    model.transformer_blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args))
    final = []
    model.transformer_blocks[-1].register_forward_hook(lambda m, args, out: final.append(out))
    out = predict(model, data)
    tokens, text, _, grid, scale = seen[0][:5]
    n = size[0] * size[1] // 4
    assert grid == (size[0] // 2, size[1] // 2) and scale == 1.0 and tokens.shape == (2, 2 * n, 16) and text.shape == (2, 4, 16)
    torch.testing.assert_close(tokens[:, :n], model.pos_embed(data["hidden_states"])); torch.testing.assert_close(tokens[:, n:], model.pos_embed(data["lr_latents"]))
    words, image = final[0]
    assert words is None and image.shape == (2, 2 * n, 16)
    with torch.no_grad():
        temb = model.time_text_embed(data["timestep"], data["pooled_projections"])
        patches = model.proj_out(model.norm_out(image[:, :n], temb))  # the LR half is dropped
    y, x = 1, size[1] // 2 - 1
    torch.testing.assert_close(out[:, :, 2 * y:2 * y + 2, 2 * x:2 * x + 2], patches[:, y * size[1] // 2 + x].reshape(2, 2, 2, 16).permute(0, 3, 1, 2))


@pytest.mark.parametrize("legacy", [False, True])
def test_prediction_depends_on_both_latents_and_the_text(legacy):
    model, data = dit4sr(legacy=legacy), inputs()
    out = predict(model, data)
    for name in data:
        changed = {**data, name: data[name].flip(0) + 1}
        assert (predict(model, changed) - out).abs().max() > 1e-3, name
    moved = {**data, "lr_latents": data["lr_latents"].roll(2, -1)}  # one patch aside: where an LR token is matters
    assert (predict(model, moved) - out).abs().max() > 1e-3
    assert (predict(model, {**data, "hidden_states": data["lr_latents"], "lr_latents": data["hidden_states"]}) - out).abs().max() > 1e-2


def test_hidden_lr_tokens_leave_sd3():
    "Masked LR tokens: SD 3 to rounding. Visible: not, from step 0 on, though what they show is not heard."
    base = sd3(dual_attention_layers=())
    model, data = DiT4SRTransformer2DModel.from_transformer(base), inputs()
    mask = torch.zeros(1, 1, 1, 36); mask[..., 16:32] = -torch.inf
    with torch.no_grad(): expected = base(**{k: v for k, v in data.items() if k != "lr_latents"}).sample
    hidden, visible, other = (predict(model, d) for d in ({**data, "joint_attention_kwargs": dict(attention_mask=mask)}, data, {**data, "lr_latents": -data["lr_latents"]}))
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert (visible - expected).norm() / expected.norm() > 0.02 and torch.equal(visible, other)


def test_batch_of_one_and_control_scale():
    model, data = dit4sr(), inputs(6, 10)
    out = predict(model, data)
    for i in range(2): torch.testing.assert_close(predict(model, {k: v[i:i + 1] for k, v in data.items()}), out[i:i + 1], atol=1e-5, rtol=1e-5)
    changed = predict(model, {**data, "control_scale": 1.2})
    assert (changed - out).abs().max() > 1e-3
    torch.testing.assert_close(predict(dit4sr(control_scale=1.2), data), changed)


def test_without_norms_and_second_attentions():
    "SD 3.0's architecture."
    model = dit4sr(qk_norm=None, dual_attention_layers=())
    assert predict(model, inputs()).isfinite().all() and not any("attn2" in n for n, _ in model.named_parameters())


# -- what trains

def test_counts_at_full_size():
    counts = count_parameters()
    assert (counts["base"], counts["control"], counts["trained"]) == (2_243_171_520, 350_877_696, 350_877_696)
    unused = 13 * (4 * (1536 ** 2 + 1536) + 2 * 64)  # text projections of the published attn2
    assert counts["total"] + unused == 2_716_814_144  # published: 2716.8 M
    assert count_parameters({**sd35_medium_config(), "legacy": True})["trained"] == 350_877_696 - 37 * (1536 ** 2 + 1536)


@pytest.mark.parametrize("legacy", [False, True])
def test_which_parameters_receive_gradients(legacy):
    "Step 0: queries and output maps only shape what nobody hears yet. Afterwards all. Keys never, with the key bug. Nothing outside control, ever."
    model = DiT4SRTransformer2DModel.from_transformer(sd3(), legacy=legacy)
    backbone = DiT4SR(model, null_text=0)
    optimizer = torch.optim.SGD(backbone.trainable_parameters(), 0.05)
    hears = []
    for step in range(2):
        F.mse_loss(model(**inputs()).sample, torch.zeros(2, 16, 8, 8)).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        hears.append([k for k in KINDS if all(g is not None and g.abs().max() > 0 for n, g in grads.items() if k in n)])
        assert all(g is None for n, g in grads.items() if "control" not in n or (legacy and "to_k_control" in n))
        optimizer.step(); optimizer.zero_grad()
    keys = [] if legacy else ["to_k_control"]
    assert hears == [[*keys, "to_v_control", "control_conv"], ["to_q_control", *keys, "to_v_control", "to_out_control", "control_conv"]]
    if legacy:  # even when they are asked to train
        for p in model.parameters(): p.requires_grad_(True)
        F.mse_loss(model(**inputs()).sample, torch.zeros(2, 16, 8, 8)).backward()
        assert all(p.grad is None for n, p in model.named_parameters() if "to_k_control" in n)


def test_optimiser_step_changes_control_alone():
    model = DiT4SRTransformer2DModel.from_transformer(sd3())
    awake(model, 0.05)
    backbone, before = DiT4SR(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(control_parameters(model)) and backbone.stages == [(0, "control")] and backbone.stage_at(10 ** 6) == "control"
    optimizer = torch.optim.AdamW(backbone.trainable_parameters(), 1e-2, weight_decay=0.5)
    g = torch.Generator().manual_seed(0)
    batch = dict(hr=torch.rand(2, 3, 64, 64, generator=g), lr=torch.rand(2, 3, 16, 16, generator=g), caption=["a", "b"])
    loss, parts = backbone.training_loss(batch, torch.Generator().manual_seed(0), "cpu", 0)
    loss.backward(); optimizer.step()
    assert not parts["flow"].requires_grad and len(optimizer.state) == len(control_parameters(model))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(control_parameters(model))
    backbone.enter("all")
    assert all(p.requires_grad for p in model.parameters())
    backbone.enter(backbone.stage_at(0))
    assert len(backbone.trainable_parameters()) == len(control_parameters(model))


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for on in (False, True):
        model = dit4sr().train()
        if on: model.enable_gradient_checkpointing()
        for n, p in model.named_parameters(): p.requires_grad_("control" in n)
        model(**inputs(6, 10)).sample.square().mean().backward()
        grads.append([p.grad for p in control_parameters(model).values()])
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


def test_compiles_in_one_graph():
    model, data = dit4sr(num_layers=2, dual_attention_layers=(0,)), inputs(6, 10)
    expected = predict(model, data)
    torch.testing.assert_close(predict(torch.compile(model, backend="eager", fullgraph=True), data), expected, atol=1e-5, rtol=1e-5)


def test_bf16_and_a_frozen_base_of_bf16():
    exact, data = predict(dit4sr(), inputs()), inputs()
    half = predict(dit4sr().bfloat16(), {k: v.bfloat16() if k != "timestep" else v for k, v in data.items()})
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() / exact.norm() < 0.05
    backbone = half_frozen(DiT4SR(dit4sr()))
    assert {n: p.dtype for n, p in backbone.model.named_parameters()} == {n: torch.float32 if "control" in n else torch.bfloat16 for n, _ in backbone.model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = backbone.predict(data["hidden_states"], data["timestep"], data)
    assert mixed.dtype == torch.float32 and (mixed - exact).norm() / exact.norm() < 0.05
    mixed.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in control_parameters(backbone.model).values())
    whole = DiT4SR(dit4sr().bfloat16(), trainable="all")  # latents stay float32 outside
    assert whole.predict(data["hidden_states"], data["timestep"], data).dtype == torch.float32


# -- reading and writing

def test_from_a_folder_of_sd3(tmp_path):
    base = sd3()
    base.save_pretrained(tmp_path / "sd3"); base.save_pretrained(tmp_path / "pipeline/transformer"); base.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for place, options in (("sd3", {}), ("pipeline", {}), ("pipeline", dict(subfolder="transformer")), ("shards", dict(legacy=True))):
        model = DiT4SRTransformer2DModel.from_pretrained(tmp_path / place, **options)
        state = model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items()) and not any(p.is_meta for p in model.parameters())
        assert all(torch.equal(p, state[n.replace("to_out_control", "to_out.0")]) if "to_out" in n else not p.any() for n, p in model.named_parameters() if "control" in n)
        assert all(p.requires_grad for p in model.parameters()) and model.config.legacy == options.get("legacy", False)
    assert DiT4SRTransformer2DModel.from_pretrained(tmp_path / "sd3", torch_dtype=torch.bfloat16).transformer_blocks[0].attn.to_out_control.weight.dtype == torch.bfloat16
    frozen = DiT4SRTransformer2DModel.from_transformer(base.requires_grad_(False))
    assert all(p.requires_grad for n, p in frozen.named_parameters() if "control" in n)


def test_own_folder_comes_back_exactly(tmp_path):
    model = dit4sr(legacy=True, control_scale=1.1)
    model.save_pretrained(tmp_path / "own", max_shard_size="40KB")
    assert json.loads((tmp_path / "own/config.json").read_text())["_class_name"] == "DiT4SRTransformer2DModel"
    again, info = DiT4SRTransformer2DModel.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert (again.config.legacy, again.config.control_scale, again.config.num_layers, tuple(again.config.dual_attention_layers)) == (True, 1.1, 3, (0, 1)) and not info["missing_keys"]
    assert list(again.state_dict()) == list(model.state_dict()) and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(predict(again, inputs()), predict(model, inputs()))
    again.save_pretrained(tmp_path / "twice")
    strip = lambda p: {k: v for k, v in json.loads((p / "config.json").read_text()).items() if not k.startswith("_name")}  # noqa: E731
    assert strip(tmp_path / "own") == strip(tmp_path / "twice")


def test_wrong_folders_are_named(tmp_path):
    base = sd3(); base.save_pretrained(tmp_path / "sd3")
    state = base.state_dict()
    gone = {k: v for k, v in state.items() if "blocks.1.attn.to_q" not in k}
    save_file(gone, tmp_path / "sd3/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 2 weights of the model, the first is transformer_blocks\.1\.attn\.to_q\.bias"): DiT4SRTransformer2DModel.from_pretrained(tmp_path / "sd3")
    model = dit4sr(); model.save_pretrained(tmp_path / "own")
    save_file(state, tmp_path / "own/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="lacks .* weights of the model, .*control"): DiT4SRTransformer2DModel.from_pretrained(tmp_path / "own")
    UNet2DConditionModel(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, cross_attention_dim=4, attention_head_dim=2, down_block_types=("DownBlock2D",) * 2,
                         up_block_types=("UpBlock2D",) * 2).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel; DiT4SR starts from"): DiT4SRTransformer2DModel.from_pretrained(tmp_path / "unet")
    with pytest.raises(OSError, match="nothing"): DiT4SRTransformer2DModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="expected config.json"): DiT4SRTransformer2DModel.from_published(tmp_path / "nothing")
    with pytest.raises(ValueError, match="device_map needs a folder of DiT4SR"): DiT4SRTransformer2DModel.from_pretrained(tmp_path / "sd3", device_map="cpu")


def published(model, extra=True):
    "A state as the published classes write it: text projections in every second attention, which nothing reads."
    state = dict(model.state_dict())
    for k, v in model.state_dict().items():
        i, _, rest = k.removeprefix("transformer_blocks.").partition(".attn.")
        if extra and i in ("0", "1") and rest.startswith(("add_", "to_add_out", "norm_added")): state[f"transformer_blocks.{i}.attn2.{rest}"] = v.clone()
    return state


def test_published_weights(tmp_path):
    model = dit4sr()
    state = published(model)
    assert len(state) == len(model.state_dict()) + 2 * 10
    found = convert_published({f"module.{k}": v for k, v in state.items()}, CONFIG)
    assert found.keys() == model.state_dict().keys()
    wrong = {**state, "transformer_blocks.0.attn.to_z_control.weight": torch.zeros(1), "transformer_blocks.2.ff.control_conv.bias": torch.zeros(3)}
    del wrong["proj_out.bias"]
    with pytest.raises(ValueError, match=r"1 unknown: transformer_blocks\.0\.attn\.to_z_control\.weight; 1 missing: proj_out\.bias; 1 of another shape: transformer_blocks\.2\.ff\.control_conv\.bias \(3,\) instead of \(64,\)"): convert_published(wrong, CONFIG)
    for legacy in (False, True):
        model = dit4sr(legacy=legacy)
        if legacy:
            for n, p in model.named_parameters():
                if "to_k_control" in n: p.data.zero_()
        folder = tmp_path / f"{legacy}" / "transformer"
        folder.mkdir(parents=True)
        save_file(published(model), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(dict(CONFIG, _class_name="SD3Transformer2DModel", _diffusers_version="0.33.0")))
        read = DiT4SRTransformer2DModel.from_published(folder.parent)
        assert read.config.legacy is legacy and torch.equal(predict(read, inputs()), predict(model, inputs()))
        assert DiT4SRTransformer2DModel.from_published(folder, legacy=not legacy).config.legacy is not legacy
        with pytest.raises(ValueError, match="from_published"): DiT4SRTransformer2DModel.from_pretrained(folder)
    read.save_pretrained(tmp_path / "converted")
    assert torch.equal(predict(DiT4SRTransformer2DModel.from_pretrained(tmp_path / "converted"), inputs()), predict(read, inputs()))


def test_backbone_folder(tmp_path):
    backbone = tiny_dit4sr(3, shift=3.0)
    awake(backbone.model, 0.1)
    target = tmp_path / "run/model"
    target.mkdir(parents=True); (target / "notes.txt").write_text("mine"); (target / "diffusion_pytorch_model-00002-of-00002.safetensors").write_text("of an older model")
    backbone.save_pretrained(target)
    assert sorted(p.name for p in tmp_path.joinpath("run").iterdir()) == ["model"]
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors", "notes.txt", "scheduler"]
    assert set(load_file(target / "diffusion_pytorch_model.safetensors")) == set(backbone.model.state_dict())
    again = DiT4SR.from_pretrained(target, trainable="all")
    assert again.shift == 3.0 and all(torch.equal(v, again.model.state_dict()[k]) for k, v in backbone.model.state_dict().items())
    lr = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(b.restore(lr, torch.Generator().manual_seed(1), steps=2) for b in (backbone, again)))
    good = {p.name: p.stat().st_size for p in target.iterdir()}
    backbone.model.save_pretrained = lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"): backbone.save_pretrained(target)
    assert {p.name: p.stat().st_size for p in target.iterdir()} == good and [p.name for p in target.parent.iterdir()] == ["model"]


# -- the backbone

class Words:
    "Embeddings that depend on the caption, and remember what was asked."
    def __init__(self): self.asked = []

    def __call__(self, captions):
        self.asked.append(list(captions))
        g = [torch.Generator().manual_seed(sum(map(ord, c))) for c in captions]
        return dict(encoder_hidden_states=torch.stack([torch.randn(3, 12, generator=x) for x in g]), pooled_projections=torch.stack([torch.randn(12, generator=x) for x in g]))


def pair(n=4, size=32):
    g = torch.Generator().manual_seed(0)
    return dict(hr=torch.rand(n, 3, size, size, generator=g), lr=torch.rand(n, 3, size // 4, size // 4, generator=g), caption=[f"picture {i}" for i in range(n)])


@pytest.mark.parametrize("loss_on, shift", [("velocity", 1.0), ("latent", 3.0)])
def test_training_loss_is_flow_matching(loss_on, shift):
    backbone, batch = tiny_dit4sr(loss_on=loss_on, shift=shift), pair()  # predicts zero
    loss, parts = backbone.training_loss(batch, torch.Generator().manual_seed(7), "cpu")
    g, x = torch.Generator().manual_seed(7), backbone.encode(batch["hr"] * 2 - 1)
    noise = torch.randn(x.shape, generator=g)
    sigma = torch.randn(4, generator=g).sigmoid()
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    weight = sigma.square() if loss_on == "latent" else torch.ones(4)
    expected = (weight[:, None, None, None] * (noise - x).square()).mean()
    torch.testing.assert_close(loss.detach(), expected); assert torch.equal(parts["flow"], loss.detach())
    torch.testing.assert_close(shifted(torch.tensor([0.0, 500.0, 1000.0]), 3.0), torch.tensor([0.0, 750.0, 1000.0]))


def test_captions_are_dropped_one_by_one():
    text = Words()
    backbone, batch = DiT4SR(dit4sr(), text=text), pair(16)
    for seed in range(15): backbone.training_loss(batch, torch.Generator().manual_seed(seed), "cpu")
    asked = [c for call in text.asked for c in call]
    share = asked.count("") / len(asked)
    assert len(asked) == 240 and 0.12 < share < 0.28 and len({tuple(c == "" for c in call) for call in text.asked}) > 10
    with pytest.raises(ValueError, match="3 captions for 16 pictures"): backbone.training_loss({**batch, "caption": ["a"] * 3}, torch.Generator(), "cpu")
    text.asked.clear()
    for _ in range(2): backbone.training_loss(batch, torch.Generator().manual_seed(3), "cpu")
    assert text.asked[0] == text.asked[1]
    for share, expected in ((0.0, set(batch["caption"])), (1.0, {""})):
        text.asked.clear(); backbone.null_text = share
        backbone.training_loss(batch, torch.Generator().manual_seed(3), "cpu")
        assert set(text.asked[0]) == expected


def test_cached_latents_and_embeddings_give_the_same_loss():
    text = Words()
    backbone, batch = DiT4SR(dit4sr(), text=text, null_text=0.5), pair()
    expected, _ = backbone.training_loss(batch, torch.Generator().manual_seed(1), "cpu")
    assert "" in text.asked[-1] and "picture 0" in "".join(text.asked[-1])
    cached = dict(latents=backbone.encode(batch["hr"] * 2 - 1), lr_latents=backbone.condition(batch["lr"], (32, 32))["lr_latents"], **text(batch["caption"]))
    found, _ = backbone.training_loss(cached, torch.Generator().manual_seed(1), "cpu")
    assert torch.equal(found, expected)
    cached["encoder_hidden_states"] = cached["encoder_hidden_states"][:, :2]
    with pytest.raises(ValueError, match="do not match those of an empty caption"): backbone.training_loss(cached, torch.Generator().manual_seed(1), "cpu")


def test_guidance():
    backbone, data = DiT4SR(dit4sr(), text=Words()), inputs()
    condition = backbone.condition(torch.rand(2, 3, 16, 16), (64, 64), ["a cat", "a dog"])
    other = {**condition, **backbone.text(["blurry"] * 2)}
    with torch.no_grad():
        low, high = (backbone.predict(data["hidden_states"], data["timestep"], c, 1.2) for c in (other, condition))
        found = backbone.guided(condition, 8.0, "blurry", 1.2)(data["hidden_states"], data["timestep"])
        once = backbone.guided(condition, 1.0, "blurry", 1.2)(data["hidden_states"], data["timestep"])
    torch.testing.assert_close(found, low + 8 * (high - low), atol=1e-4, rtol=1e-4); torch.testing.assert_close(once, high)
    assert (high - low).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(3, 5), (8, 12), (9, 16)])
def test_restore_any_size(size):
    backbone = tiny_dit4sr()
    lr = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    walks = [backbone.restore(lr, torch.Generator().manual_seed(2), steps=2, strength=s, guidance_scale=g, negative="noisy") for s, g in ((1.0, 1.0), (0.5, 1.0), (1.0, 3.0))]
    for out in walks: assert out.shape == (1, 3, 4 * size[0], 4 * size[1]) and 0 <= out.min() and out.max() <= 1
    shape = (1, 16, -(-size[0] // 4) * 2, -(-size[1] // 4) * 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(backbone.restore(lr, noise, steps=2), walks[0]) and not torch.equal(walks[1], walks[0])
    with pytest.raises(ValueError, match="this picture needs"): backbone.restore(lr, noise[..., :-1], steps=2)


def test_processors_cannot_be_exchanged_in_silence():
    model = dit4sr()
    with pytest.raises(ValueError, match="JointAttnProcessor2_0 would drop"): model.set_attn_processor(diffusers.models.attention_processor.JointAttnProcessor2_0())
    with pytest.raises(NotImplementedError, match="fused"): model.fuse_qkv_projections()
    with pytest.raises(NotImplementedError, match="enable_gradient_checkpointing"): model.enable_forward_chunking(1, 1)
    model.set_attn_processor(ControlAttnProcessor())


# -- FRAMER on it

def test_framer_takes_every_block_at_full_size():
    "FRAMER_D: 24 layers, 23 students and the teacher, 1536 channels each."
    with torch.device("meta"): model = DiT4SRTransformer2DModel(**sd35_medium_config())
    taps = find_taps(model)
    table = taps.table()
    assert [r["name"] for r in table] == [f"transformer_blocks.{i}" for i in range(24)] and {r["channels"] for r in table} == {1536} and not taps.multiscale
    assert [r["role"] for r in table] == ["student"] * 23 + ["teacher"] and {r["kind"] for r in table} == {"DiT4SRBlock"}
    with torch.device("meta"), Recorder(model.train(), taps) as recorder:  # 512 x 768 pixels, 154 tokens of text
        out = model(torch.zeros(1, 16, 64, 96), torch.zeros(1, 16, 64, 96), torch.zeros(1, 154, 4096), torch.zeros(1, 2048), torch.zeros(1)).sample
        assert out.shape == (1, 16, 64, 96) and [m.shape for m in recorder.features] == [(1, 1536, 32, 48)] * 24


@pytest.mark.parametrize("text", [4, 15, 30])
def test_framer_reads_the_noise_half(text):
    "Also when the text is as long as the map, or as both halves."
    model, data, seen = dit4sr().train(), inputs(6, 10, text=text), []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append(out[1])) for b in model.transformer_blocks]
    with Recorder(model, find_taps(model)) as recorder:
        model(**data)
        maps = recorder.features
    assert len(maps) == len(seen) == 3
    for m, tokens in zip(maps, seen):
        assert m.shape == (2, 16, 3, 5) and tokens.shape == (2, 30, 16)
        assert torch.equal(m, tokens[:, :15].transpose(1, 2).reshape(2, 16, 3, 5)) and not torch.equal(m.flatten(2), tokens[:, 15:].transpose(1, 2))
    for h in hooks: h.remove()


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: b.model], ids=["backbone", "model"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_framer_trains_the_control_parameters(wrap, checkpointing):
    backbone, batch = DiT4SR(dit4sr().train()), pair()
    if checkpointing: backbone.model.enable_gradient_checkpointing()
    keys, grads, data = list(backbone.model.state_dict()), [], inputs()
    expected = predict(backbone.model, data)
    for attach in (False, True):
        if attach: framer = Framer.attach(wrap(backbone))
        loss, _ = backbone.training_loss(batch, torch.Generator().manual_seed(1), "cpu")
        total = loss + framer.loss() if attach else loss
        total.backward()
        grads.append({n: p.grad.clone() for n, p in control_parameters(backbone.model).items()})
        backbone.model.zero_grad()
    assert len(framer.terms.layers) == 2 and total > loss and not list(framer.parameters())
    assert any((grads[1][n] - grads[0][n]).abs().max() > 1e-6 for n in grads[0] if ".0." in n)  # the first block is taught
    framer.detach()
    assert list(backbone.model.state_dict()) == keys and torch.equal(predict(backbone.model, data), expected)


def test_a_model_without_a_word_on_its_tokens_is_refused():
    model, data = dit4sr().train(), inputs()
    model.map_tokens = None
    with Recorder(model, find_taps(model)), pytest.raises(ValueError, match="map_tokens"): model(**data)


def test_no_warning_from_tiny():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = tiny_dit4sr()
        backbone.training_loss(pair(), torch.Generator().manual_seed(0), "cpu")[0].backward()
