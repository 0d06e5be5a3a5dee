"Captioning a folder as it happens: killed and resumed, shared by processes, without weights, from a hub's cache, as a notebook."
import ast, json, multiprocessing, os, subprocess, sys, time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from framer import captions as c
from framer.datasets import PairDataset

ROOT = Path(__file__).parents[1]

def without_model(folder, out, rank=0, world=1, seconds=0.0):
    "`caption_folder` with a describer that takes no model."
    def describe(captioner, pictures, *args): time.sleep(seconds); return [f"A picture of {p.size[0]} pixels. It is in focus." for p in pictures]
    c.describe, real = describe, c.describe
    try: return c.caption_folder(folder, c.Captioner(None, None, "none", "0", Path(), "cpu", "fp32"), out=out, batch_size=2, rank=rank, world=world, progress=False)
    finally: c.describe = real


def process(*args):
    "The same in a process of its own."
    p = multiprocessing.get_context("fork").Process(target=without_model, args=args)
    p.start()
    return p


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "20 small pictures, each of its own width."
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(20): Image.new("RGB", (30 + i, 20), (10 * i, 0, 0)).save(folder / f"p{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    pytest.importorskip("transformers")
    return c.save_tiny_llava(tmp_path_factory.mktemp("model") / "tiny-llava")


def expected(folder): return {p.stem: f"A picture of {Image.open(p).size[0]} pixels." for p in folder.glob("*.png")}


def test_killed_and_resumed(folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    first = process(folder, out, 0, 1, 0.2)
    for _ in range(600):
        if out.exists() and out.read_bytes().count(b"\n") >= 5: break
        time.sleep(0.1)
    first.kill(); first.join()
    done = out.read_bytes().count(b"\n") - 1
    assert 4 <= done < 20
    with open(out, "ab") as file: file.write(b'{"stem": "p19", "caption": "half of a l')   # killed within a write
    assert len(c.read_captions(out)) == done
    report = without_model(folder, out)
    assert (report.made, report.kept) == (20 - done, done)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert Counter(line["stem"] for line in lines[1:]) == {f"p{i:02}": 1 for i in range(20)}    # nothing lost, nothing twice
    assert dict(c.read_captions(out)) == expected(folder)
    assert without_model(folder, out).made == 0 and len(out.read_text().splitlines()) == 21


def test_processes_share_a_folder(folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    for p in [process(folder, out, rank, 3, 0.05) for rank in range(3)]:
        p.join(60)
        assert p.exitcode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert Counter(line.get("stem") for line in lines[1:]) == {f"p{i:02}": 1 for i in range(20)} and "framer_captions" in lines[0]
    assert dict(c.read_captions(out)) == expected(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["captions.jsonl"]


def test_one_share_is_written_by_one_process(folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    c._begin(out, dict(framer_captions=1, settings={}))
    with c._alone(out, 0, 2):
        with pytest.raises(c.SidecarError, match="share 0 of 2"), c._alone(out, 0, 2): pass
        with c._alone(out, 1, 2): pass
    with c._alone(out, 0, 2): pass
    with pytest.raises(ValueError, match="rank=2, world=2"), c._alone(out, 2, 2): pass


def test_a_folder_of_nothing_readable(tmp_path, tiny):
    (tmp_path / "a.png").write_bytes(b"not a picture"); (tmp_path / "b.jpg").touch()
    report = c.caption_folder(tmp_path, c.load_captioner(tiny, device="cpu"), c.CaptionSettings(max_new_tokens=4), progress=False)
    assert report.made == 0 and set(report.failed) == {"a", "b"} and "is empty" in report.failed["b"]
    captions = c.read_captions(tmp_path)
    assert len(captions) == 0 and set(captions.failed) == {"a", "b"} and "2 of the missing could not be read" in str(captions.coverage(["a", "b"]))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_speaks(tiny, dtype):
    captioner = c.load_captioner(tiny, dtype=dtype, device="cpu")
    assert captioner.model.dtype == c.DTYPES[dtype] and captioner.dtype == dtype
    texts = c.describe(captioner, [Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")], max_new_tokens=6, temperature=1.0)
    assert all(set(t.split()) <= set(c._TINY_WORDS) for t in texts) and any(texts)


def test_captions_join_datasets(tmp_path):
    "By stem, also where the dataset names pictures by their path."
    paths = sorted((ROOT / "data/photographs/val").glob("*.jpg"))[:2]
    captions = c.Captions({paths[0].stem: "A tower."})
    dataset = PairDataset(paths, size=64, captions=captions)
    assert [dataset.draw(i)["caption"] for i in range(2)] == ["A tower.", ""]
    assert captions.coverage(paths).missing == [paths[1].stem]


# -- the model: from a hub's cache, from the network, not at all

def test_a_model_in_the_hubs_cache(tiny, tmp_path, monkeypatch):
    import huggingface_hub
    commit = "4bd3f1a2" * 5
    snapshot = tmp_path / "models--llava-hf--tiny" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True); snapshot.symlink_to(tiny)
    (tmp_path / "models--llava-hf--tiny" / "refs").mkdir(); (tmp_path / "models--llava-hf--tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    captioner = c.load_captioner("llava-hf/tiny", device="cpu")
    assert captioner.name == "llava-hf/tiny" and captioner.revision == commit and commit in str(captioner)
    with pytest.raises(c.NoModel, match="revision 0000"): c.find_model("llava-hf/tiny", revision="0000")


def test_the_network_is_asked_only_with_download(monkeypatch):
    import httpx, huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    asked = []
    def hub(error):
        def snapshot_download(model, revision=None, local_files_only=False, **kw):
            asked.append(local_files_only)
            raise LocalEntryNotFoundError("not here") if local_files_only else error
        return snapshot_download
    gated = GatedRepoError("403 Client Error. Access to model is restricted", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))
    for error, words in ((ConnectionError("Name or service not known"), "ConnectionError: Name or service"), (gated, "GatedRepoError: 403 Client Error"), (OSError(28, "No space left on device"), "No space left")):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub(error))
        with pytest.raises(c.NoModel, match="where downloaded models are kept"): c.load_captioner(c.MODEL)
        with pytest.raises(c.NoModel, match=words) as raised: c.load_captioner(c.MODEL, download=True)
        assert "hf auth login" in str(raised.value) and "is no folder, and is not in" not in str(raised.value)
    assert asked == [True, False] * 3


def test_a_model_that_does_not_fit(tiny, monkeypatch):
    from transformers import LlavaForConditionalGeneration
    def full(self, *args, **kw): raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(LlavaForConditionalGeneration, "to", full)
    with pytest.raises(RuntimeError, match="does not fit cpu in fp32: take eight_bit=True"): c.load_captioner(tiny, device="cpu")


def test_cuda_that_is_not_there():
    if torch.cuda.is_available(): pytest.skip("this machine has CUDA")
    with pytest.raises(ValueError, match="no CUDA device"): c.choose_device("cuda:1")


# -- the notebook

def notebook(tmp_path, **parameters):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/caption.ipynb"), str(tmp_path / "out.ipynb"), "-k", "python3", "--no-progress-bar"]
    for k, v in parameters.items(): command += ["-p", k, str(v)]
    env = dict(os.environ, FRAMER_ROOT=str(ROOT), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_CACHE=str(tmp_path / "hub"))
    done = subprocess.run(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    text = "".join("".join(o.get("text", [])) for cell in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in cell.get("outputs", []))
    return done, text


def test_caption_notebook(tiny, folder, tmp_path):
    done, text = notebook(tmp_path, images=folder, model=tiny, out=tmp_path / "captions.jsonl", limit=7, source="lr", size=64, max_new_tokens=6, batch_size=3, parquet=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "7 captions made" in text and "7 of 20 pictures have a caption" in text and "tiny-llava (revision" in text
    captions = c.read_captions(tmp_path / "captions.jsonl")
    assert list(captions) == [f"p{i:02}" for i in range(7)] and captions.settings["source"] == "lr" and captions.settings["size"] == 64
    assert dict(c.read_captions(tmp_path / "captions.parquet")) == dict(captions) and not list(folder.glob("*.jsonl"))


def test_caption_notebook_without_weights(folder, tmp_path):
    done, text = notebook(tmp_path, images=folder)
    assert done.returncode == 1 and "NoModel" in done.stderr and "llava-hf/llava-1.5-13b-hf" in done.stderr and "download=True" in done.stderr
    assert not list(folder.glob("*captions*"))


def test_notebook_and_module_have_the_same_defaults():
    cells = json.loads((ROOT / "nbs/caption.ipynb").read_text())["cells"]
    read = lambda cell: {n.target.id: ast.literal_eval(n.value) for n in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(n, ast.AnnAssign)}
    tagged = read(next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])))
    assert tagged == read(next(cell for cell in cells if "class Parameters" in "".join(cell["source"])))
    settings = c.CaptionSettings()
    assert {k: v for k, v in tagged.items() if hasattr(settings, k)} == vars(settings) and tagged["model"] == c.MODEL
