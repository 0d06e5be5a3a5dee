"The cache as training uses it: many processes, a full disk, a killed writer."
import multiprocessing, resource, signal, time, warnings

import pytest
import torch

from framer.cache import LatentCache, PromptCache, TensorStore, caches, fingerprint


def start(function, *args):
    "A process of its own."
    p = multiprocessing.get_context("fork").Process(target=function, args=args)
    p.start()
    return p


def write_and_read(folder):
    warnings.simplefilter("error")   # half an entry would warn
    store = TensorStore(folder, dict(a=1))
    for i in [i for turn in range(10) for i in range(10)]:
        entry = store.get(i)
        assert entry is None or torch.equal(entry["x"], torch.full((100_000,), float(i))), i
        store.put(i, dict(x=torch.full((100_000,), float(i))))


def write_for_ever(folder):
    store = TensorStore(folder, {})
    for i in range(10**9): store.put(i % 50, dict(x=torch.full((50_000,), float(i % 50))))


def train_on_a_full_disk(folder):
    "Files of more than 4000 bytes cannot be written here."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    cache = LatentCache(folder, "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            out = cache.get_or_make([(step, 0)], lambda keys: dict(x=torch.full((1, 5000), 7.0)))
            assert out["x"].shape == (1, 5000) and (out["x"] == 7).all()
    assert len(cache) == 0 and ["stores nothing more" in str(w.message) for w in caught] == [True], [str(w.message) for w in caught]


def test_writers_at_the_same_time(tmp_path):
    for p in [start(write_and_read, tmp_path) for _ in range(3)]:
        p.join(60)
        assert p.exitcode == 0
    store = TensorStore(tmp_path, dict(a=1))
    assert len(store) == 10 and not [f for f in store.folder.rglob(".*")]
    assert [s.settings for s in caches(tmp_path)] == [dict(a=1)]


def test_a_writer_that_is_killed_leaves_whole_entries(tmp_path):
    p = start(write_for_ever, tmp_path)
    store = TensorStore(tmp_path, {})
    while len(store) < 20 and p.is_alive(): time.sleep(0.02)
    p.kill(); p.join()
    assert len(store) >= 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # a damaged entry would warn
        found = [(i, store.get(i)) for i in range(50)]
    assert all(torch.equal(t["x"], torch.full((50_000,), float(i))) for i, t in found if t is not None)
    store.clear(); assert not store.folder.exists()


def test_a_full_disk_stops_the_storing_and_not_the_training(tmp_path):
    p = start(train_on_a_full_disk, tmp_path); p.join(60)
    assert p.exitcode == 0
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "settings.json"]


class Cached(torch.utils.data.Dataset):
    def __init__(self, cache): self.cache = cache
    def __len__(self): return 6
    def __getitem__(self, i): return self.cache.get_or_make([(i, 0)], lambda keys: dict(x=torch.full((1, 3), float(keys[0][0]))))["x"][0]


def test_loader_workers_share_a_cache(tmp_path):
    cache = LatentCache(tmp_path, "model", dtype="bf16")
    for _ in range(2):
        batch = torch.cat(list(torch.utils.data.DataLoader(Cached(cache), batch_size=2, num_workers=2)))
        assert batch[:, 0].tolist() == [0, 1, 2, 3, 4, 5] and batch.dtype == torch.bfloat16
    assert len(cache) == 6


def test_encoders_stay_away_where_all_texts_are_known(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8, eos_token_id=1, bos_token_id=0, pad_token_id=1)
    torch.manual_seed(0); transformers.CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "encoder")
    key, alive = fingerprint(tmp_path / "encoder", memo=tmp_path / "memo.json"), []

    def load():
        model = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "encoder").eval(); alive.append(model.register_forward_hook(lambda *a: None))
        @torch.no_grad()
        def encode(texts):
            out = model(torch.tensor([[len(w) % 50 for w in (t.split() + [""] * 8)[:8]] for t in texts]))
            return dict(encoder_hidden_states=out.last_hidden_state, pooled_projections=out.text_embeds)
        return encode

    prompts = PromptCache(tmp_path / "cache", key, dtype="fp32")
    assert prompts.fill(["a red bird", "", "a river at night"], load, batch_size=2) == 3 and len(alive) == 1
    def never(): raise AssertionError("the encoders were loaded")
    later = PromptCache(tmp_path / "cache", fingerprint(tmp_path / "encoder", memo=tmp_path / "memo.json"), dtype="fp32")
    assert later.fill(["", "a red bird"], never) == 0 and later[["a red bird", "", ""]]["encoder_hidden_states"].shape == (3, 8, 16)
    torch.testing.assert_close(later[["a red bird", ""]]["pooled_projections"], load()(["a red bird", ""])["pooled_projections"])
    with torch.no_grad(): changed = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "encoder"); changed.text_projection.weight[0, 0] += 1e-3; changed.save_pretrained(tmp_path / "encoder")
    assert PromptCache(tmp_path / "cache", fingerprint(tmp_path / "encoder", memo=tmp_path / "memo.json"), dtype="fp32").missing([""]) == [""]
