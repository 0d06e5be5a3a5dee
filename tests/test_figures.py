"Figures draw the numbers they are given, keep no state, and are saved with their origin; the notebooks that make them run; the orchestration knows what is done."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch

from framer import figures
from framer.figures import Arrow, Scene, alignment_figure, cost_figure, hierarchy_figure, layer_figure, loss_figure, magnitude_figure, matrix_figure, provenance, qualitative_figure, read_figures, save_figure, stability_figure, style

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import reports  # noqa: E402

ramp = torch.linspace(0, 1, 48).expand(3, 48, 48)


def rows(power, raw=None, times=(300, 700)):
    return [dict(timestep=t, depth=d / 6, lf=0.9 - t / 1e4, hf=(d / 6) ** power, lf_raw=raw, hf_raw=raw) for t in times for d in range(6)]


def every_figure():
    edges = np.linspace(0, 3, 11)
    series = lambda m: dict(lf=(np.full(10, m), np.full(10, 0.1)), hf=(np.linspace(0, m, 10), np.zeros(10)))
    pictures = {s: ramp * s / 10 for s in (5, 10)}
    return dict(
        loss=loss_figure([dict(step=s, noise_loss=1 / (s + 1), intra=0.1, inter=0.2, distill_loss=0.3) for s in range(5)]),
        layers=layer_figure([dict(step=s, layer=k, **{f"{n}_{b}": 0.1 * k for n in ("positive", "weight", "gate") for b in ("lf", "hf")}) for s in (1, 2) for k in range(3)]),
        magnitude=magnitude_figure({"a": dict(edges=edges, series={"HR": series(0.3), "LR": series(0.5)})}), hierarchy=hierarchy_figure(rows(3), rows(2, 0.4)),
        alignment=alignment_figure({"U-Net": (rows(4), rows(2))}), matrix=matrix_figure({"teacher": dict(LF=np.eye(4), HF=np.full((4, 4), 0.2))}),
        cost=cost_figure([dict(model="m", batch=1, dtype="fp32", time_overhead_percent=1.5, memory_overhead_percent=-0.5)]), stability=stability_figure({"a": pictures, "b": pictures}),
        qualitative=qualitative_figure([Scene("s", {"LR": ramp[:, ::4, ::4], "HR": ramp}, (8, 4, 16, 16), {"HR": [Arrow(10, 9)]})]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_state_is_left_and_every_word_is_readable(theme):
    import matplotlib.pyplot as plt
    before, paper = dict(mpl.rcParams), mpl.colors.to_rgb(figures.THEMES[theme][0])
    with style(theme): made = every_figure()
    assert dict(mpl.rcParams) == before and plt.get_fignums() == []
    for name, figure in made.items():
        assert np.allclose(mpl.colors.to_rgb(figure.get_facecolor()), paper), name
        for text in figure.findobj(mpl.text.Text):
            if text.get_text().strip(): assert abs(np.mean(mpl.colors.to_rgb(text.get_color())) - np.mean(paper)) > 0.4, f"{name}: {text.get_text()!r} is hard to read on {theme} paper"


def test_values_plotted_are_the_values_given():
    made = every_figure()
    lf, hf, lf2, hf2 = made["magnitude"].axes[0].lines
    assert np.allclose(lf.get_xdata(), np.linspace(0.15, 2.85, 10)) and np.allclose(lf.get_ydata(), 0.3) and np.allclose(hf2.get_ydata(), np.linspace(0, 0.5, 10))
    band = made["magnitude"].axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.min(), 0.2) and np.isclose(band.max(), 0.4), "mean and sigma"
    assert len({l.get_color() for l in (lf, hf, lf2, hf2)}) == 4 and len({l.get_linestyle() for l in (lf, lf2)}) == 2
    for k, t in enumerate((300, 700)):
        unet_lf, unet_hf, dit_lf, dit_hf = made["hierarchy"].axes[k].lines
        assert [l.get_linestyle() for l in (unet_lf, unet_hf, dit_lf, dit_hf)] == [":", ":", "-", "-"] and made["hierarchy"].axes[k].get_title() == f"t = {t}"
        assert np.allclose(unet_lf.get_ydata(), 0.9 - t / 1e4) and np.allclose(unet_hf.get_ydata(), [(d / 6) ** 3 for d in range(6)]) and np.allclose(dit_hf.get_ydata(), 0.4), "a DiT without a probe"
        assert unet_lf.get_color() == dit_lf.get_color() != unet_hf.get_color()
    matrices = made["matrix"].axes
    assert np.allclose(matrices[0].images[0].get_array(), np.eye(4)) and matrices[0].images[0].get_clim() == matrices[1].images[0].get_clim() == (0, 1)
    assert [p.get_width() for ax in made["cost"].axes[:2] for p in ax.patches] == [1.5, -0.5]


def test_windows_and_arrows_are_where_they_were_put():
    scene = Scene("s", {"LR": ramp[:, ::4, ::4], "x": ramp.flip(1), "HR": ramp}, (9, 6, 20, 12), {"x": [Arrow(11, 7), Arrow(20, 16, "texture", 180)]}, whole="HR")
    whole, lr, x, hr = [ax for sub in qualitative_figure([scene]).subfigs for ax in sub.axes]
    frame = whole.patches[0]
    assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (9, 6, 20, 12) and tuple(whole.images[0].get_extent()) == (0, 48, 48, 0)
    assert np.array_equal(hr.images[0].get_array(), figures.to_numpy(ramp)[6:18, 9:29]) and hr.get_xlim() == (9, 29) and hr.get_ylim() == (18, 6)
    assert np.array_equal(lr.images[0].get_array(), figures.to_numpy(ramp[:, ::4, ::4])[1:5, 2:8]) and tuple(lr.images[0].get_extent()) == (8, 32, 20, 4) and lr.get_xlim() == (9, 29)
    assert [t.xy for t in x.texts] == [(11, 7), (20, 16)] and len(hr.texts) == len(lr.texts) == 0
    red, yellow = (mpl.colors.to_rgb(t.arrow_patch.get_facecolor()) for t in x.texts)
    assert red[0] > 0.8 and red[1] < 0.2 and yellow[0] > 0.8 and yellow[1] > 0.8 and yellow[2] < 0.2


def test_bad_input_names_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="layers.csv"): layer_figure(tmp_path)
    with pytest.raises(ValueError, match="'b': \\[10\\]"): stability_figure({"a": {5: ramp, 10: ramp}, "b": {5: ramp}}, steps=[5, 10])
    with pytest.raises(ValueError, match="at most 2"): magnitude_figure({"a": dict(edges=[0, 1], series=dict.fromkeys("abc"))})
    with pytest.raises(ValueError, match="measure='probe'"): alignment_figure({"U-Net": (rows(1), rows(1))}, "raw")


def test_saved_figures_carry_their_origin(tmp_path):
    origin = provenance("nbs/x.ipynb", dict(seed=3), ["no-such-run"])
    save_figure(lambda: cost_figure([]), tmp_path, "figure-6", "Nothing yet.", origin, ("png", "svg", "pdf"), ("light", "dark"))
    record = json.loads((tmp_path / "figure-6.json").read_text())
    assert sorted(record["files"]) == ["figure-6-dark.png", "figure-6.pdf", "figure-6.png", "figure-6.svg"] and all((tmp_path / f).stat().st_size for f in record["files"])
    assert {"notebook", "parameters", "commit", "hardware", "versions", "runs"} <= set(record) and all(w in record["caption"] for w in ("Nothing yet.", "nbs/x.ipynb", "seed=3", "no-such-run", "thread"))
    assert [f["name"] for f in read_figures(tmp_path)] == ["figure-6"]; (tmp_path / "figure-6.svg").unlink(); assert read_figures(tmp_path) == []
    assert not list(tmp_path.glob(".*.partial"))


def test_committed_figures_are_complete():
    found = read_figures(ROOT / "reports/figures")
    if not found: pytest.skip("reports/figures holds no figures")
    listed = {Path(o).stem for job in reports.read_jobs(ROOT / "docs/reports.json").values() for o in job["outputs"] if o.startswith("reports/figures/")}
    assert listed <= {f["name"] for f in found}, "some figures of docs/reports.json are not there"
    for f in found:
        assert (ROOT / f["notebook"]).is_file() and f["commit"] and f["hardware"]["cpu"] and f["notebook"] in f["caption"] and f["commit"][:10] in f["caption"], f["name"]
    assert sum(p.stat().st_size for p in (ROOT / "reports/figures").rglob("*")) < 3_000_000


# -- the notebooks

def papermill(notebook, output, root, **parameters):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / notebook), str(output), "-k", "python3", "--no-progress-bar", "-y", json.dumps(parameters)]
    return subprocess.run(command, cwd=output.parent, env=dict(os.environ, FRAMER_ROOT=str(root), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


def here(notebook, **parameters):
    "A notebook's cells in this process, which spares a kernel: parameters go where papermill would put them."
    names = {}
    for cell in json.loads((ROOT / "nbs" / notebook).read_text())["cells"]:
        if cell["cell_type"] == "code": exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []): names.update(parameters)


def test_notebooks_make_figures_of_a_three_step_run(tmp_path, monkeypatch, capsys):
    "One small run stands for all of them; figures of models, of records, of kept pictures."
    from framer.training import TrainConfig, train
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.setenv("FRAMER_ROOT", str(tmp_path))
    train(TrainConfig(run="r", steps=3, size=64, batch_size=2, validation_size=64, sampling_steps=2, num_workers=0, log_layers_every=1, validate_every=2, checkpoint_every=3, tensorboard=False), log=lambda m: None)
    done = papermill("figures.ipynb", tmp_path / "figures.ipynb", tmp_path, runs={"U-Net": ["r", "r"]}, images=2, size=64, layers=1, themes=["light"], formats=["png"])
    assert done.returncode == 0, done.stderr[-3000:]
    two = {"one": "r", "two": "r"}
    here("stability.ipynb", runs=two, points=2, train_missing=False, arrows={"two": {2: [[10, 12, "texture"]]}})
    here("qualitative.ipynb", runs=two, crop=16, run="q", way="from noise", wild=1)
    with pytest.raises(FileNotFoundError, match="is not a finished run"): here("stability.ipynb", train_missing=False)
    with pytest.raises(TypeError, match="did you mean 'picture'"): here("stability.ipynb", pictur=3)
    with pytest.raises(ValueError, match="say which scenes"): here("qualitative.ipynb", folders={"a": "b"})
    made = {f["name"]: f for f in read_figures(tmp_path / "reports/figures")}
    assert {"figure-1", "figure-2-u-net", "figure-5-u-net", "figure-6", "figure-7", "figure-8", "figure-9", "figure-10", "figure-11", "table-6"} <= set(made)
    assert made["figure-7"]["runs"][0]["steps"] == 3 and "nothing" not in made["figure-7"]["caption"] and "no benchmark file" in made["figure-6"]["caption"]
    assert "Blur Sigma | [0.2, 3.0]" in (tmp_path / "reports/figures/table-6.md").read_text() and "steps" in made["figure-8"]["caption"]


# -- the orchestration

def job_list(tmp_path, *jobs):
    path = tmp_path / "jobs.json"; path.write_text(json.dumps(dict(jobs=list(jobs)))); return path


@pytest.mark.parametrize("jobs, words", [([dict(name="a", notebook="n", outputs=["o"]), dict(name="a", notebook="n", outputs=["o"])], "name of its own"), ([dict(name="a", notebook="n")], "no outputs"),
                                         ([dict(name="a", notebook="n", outputs=["o"], needs=["b"])], "needs b"), ([dict(name="a", notebook="n", output=["o"])], "unknown output"), ([dict(name="a", like="x")], "not in `shared`")])
def test_a_wrong_list_of_jobs_says_what_is_wrong(jobs, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)): reports.read_jobs(job_list(tmp_path, *jobs))


def test_the_list_of_jobs_fits_the_notebooks():
    import papermill as pm
    for name, job in reports.read_jobs(ROOT / "docs/reports.json").items():
        assert (ROOT / job["notebook"]).is_file(), name
        assert set(job["parameters"]) <= set(pm.inspect_notebook(str(ROOT / job["notebook"]))), name


def test_a_run_is_done_when_it_finished_with_these_parameters(tmp_path):
    job = reports.read_jobs(job_list(tmp_path, dict(name="r", title="R", notebook="train.ipynb", kind="run", parameters=dict(steps=3, framer=False, resume=True))))["r"]
    folder = tmp_path / "reports/r"; (folder / "model").mkdir(parents=True); (folder / "model/config.json").write_text("{}")
    state = reports.State(tmp_path); done = lambda: reports.is_done(job, {"r": job}, state, tmp_path)
    record = lambda steps, at, framer: ((folder / "config.json").write_text(json.dumps(dict(config=dict(steps=steps, framer=framer, run="r")))), (folder / "metrics.json").write_text(json.dumps(dict(steps=at))))
    assert not done()
    for steps, at, framer, want in ((3, 3, False, True), (3, 2, False, False), (4, 4, False, False), (3, 3, True, False)): record(steps, at, framer); assert done() == want
    assert reports.records_only(job, tmp_path), "records without a checkpoint, as a fresh clone has them"
    (folder / "checkpoints/step-000002").mkdir(parents=True); assert not reports.records_only(job, tmp_path), "a run that can go on"
    reports.move_aside(job, tmp_path); assert not folder.exists() and (tmp_path / "reports/r.old-1/metrics.json").exists()


def test_jobs_run_once_go_on_and_are_redone_when_they_change(tmp_path, monkeypatch, capsys):
    import nbformat
    monkeypatch.setenv("FRAMER_ROOT", str(tmp_path)); (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    def notebook(name, code):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("word = 'x'; out = ''", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
        nbformat.write(nb, tmp_path / name)
    notebook("good.ipynb", "p = __import__('pathlib').Path(out); p.parent.mkdir(parents=True, exist_ok=True); p.write_text((p.read_text() if p.exists() else '') + word)"); notebook("bad.ipynb", "raise ValueError('broken on purpose')")
    listed = lambda word="x": job_list(tmp_path, dict(name="one", title="One", notebook="good.ipynb", outputs=["reports/one.txt"], parameters=dict(word=word, out="reports/one.txt")), dict(name="bad", title="Bad", notebook="bad.ipynb", outputs=["reports/no.txt"]),
                                      dict(name="after", title="After", notebook="good.ipynb", outputs=["reports/after.txt"], needs=["bad"]))
    assert reports.main(["--file", str(listed()), "--only", "one"]) == 0 and (tmp_path / "reports/one.txt").read_text() == "x"   # by papermill
    def quick(job, root, threads):
        log = root / job["out"]; log = log.with_suffix(".log"); log.parent.mkdir(parents=True, exist_ok=True)
        try: here(tmp_path / job["notebook"], **job["parameters"]); log.write_text("fine"); return 0, 0.0, log
        except ValueError as error: log.write_text(str(error)); return 1, 0.0, log
    monkeypatch.setattr(reports, "papermill", quick); monkeypatch.chdir(tmp_path)
    assert reports.main(["--file", str(listed()), "--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert (tmp_path / "reports/one.txt").read_text() == "x" and "broken on purpose" in said and "after: left out, it needs bad" in said
    page = (tmp_path / "reports/index.html").read_text()
    assert (tmp_path / "reports/one/good.html").is_file() and "failed" in page and all((tmp_path / "reports" / h).exists() for h in re.findall(r'href="([^"#]+)"', page)) and "http" not in re.sub(r"<code>.*?</code>", "", page)
    assert reports.main(["--file", str(listed()), "--only", "one"]) == 0 and (tmp_path / "reports/one.txt").read_text() == "x", "done once"
    assert reports.main(["--file", str(listed("y")), "--only", "one"]) == 0 and (tmp_path / "reports/one.txt").read_text() == "xy", "done again, its parameters changed"
