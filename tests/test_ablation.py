"Ablations: rows are the paper's, runs are resumed and parallel, tables have the paper's layout, verdicts follow from files."
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from framer import ablation as ab
from framer.distill import FramerConfig
from framer.runs import RunError, history_differences, read_history, run_path

ROOT = Path(__file__).parents[1]
SPLIT = dict(loss="contrastive", frequency_split=True, low="intra", high="inter", teacher="final", negative="random", faw=False, fam=False)  # "+CL-Freq Distill.", "H (Ours)", "CL only"
PAPER_ROWS = {  # table, line -> what the paper's table says about it; None is the baseline
    ("2", "Baseline"): None, ("2", "+MSE Distill."): dict(SPLIT, loss="mse", frequency_split=False), ("2", "+MSE-Freq Distill."): dict(SPLIT, loss="mse"), ("2", "+CL-Freq Distill."): SPLIT,
    ("3", "Random Layer"): dict(SPLIT, teacher="random"), ("3", "Final Layer -1"): dict(SPLIT, teacher="final-1"), ("3", "Final Layer -2"): dict(SPLIT, teacher="final-2"),
    ("3", "Previous Layer"): dict(SPLIT, negative="previous"), ("3", "Ours: Final Teacher + Random Neg."): SPLIT,
    ("4", "Baseline"): None, **{("4", name): dict(SPLIT, low=low, high=high) for name, low, high in [("A", "intra", None), ("B", "inter", None), ("C", None, "intra"), ("D", None, "inter"), ("E", "inter", "intra"),
                                ("F", "inter", "inter"), ("G", "intra", "intra"), ("H (Ours)", "intra", "inter")]},
    ("5", "Baseline"): None, **{("5", name): dict(SPLIT, faw=faw, fam=fam) for name, faw, fam in [("CL only", False, False), ("FAW only", True, False), ("FAM only", False, True), ("FAW + FAM", True, True)]},
}
READINGS = {"Full method": {}, "0.002": dict(radius=0.002), "0.05": dict(radius=0.05), "0.1": dict(radius=0.1), "0.5": dict(radius=0.5), "Magnitude spectrum": dict(spectrum="magnitude"),
            "Gradient into the teacher": dict(target_grad=True), "Constant FAW": dict(faw_grad=False), "Student's negatives": dict(in_batch="student")}


def lines(table): return [line for ls in ab.TABLES[table].lines.values() for line in ls]


# -- rows

def test_every_row_is_the_papers():
    made = {(table, line[0]): line[1] for table in "2345" for line in lines(table)}
    assert set(made) == set(PAPER_ROWS)
    for key, expected in PAPER_ROWS.items():
        config = ab.row_config(ab.AblationConfig(), made[key], 0)
        assert config.framer == (expected is not None), key
        if expected: assert {k: getattr(FramerConfig(**config.framer_options), k) for k in expected} == expected, key
        if expected: assert FramerConfig(**config.framer_options) == FramerConfig(**expected), key    # and nothing else is changed


def test_readings_change_one_thing_in_the_full_method():
    made = {line[0]: ab.ROWS[line[1]] for line in lines("readings")}
    assert made == READINGS
    assert FramerConfig() == FramerConfig(radius=0.2, spectrum="complex", target_grad=False, faw_grad=True, in_batch="teacher", faw=True, fam=True)


def test_all_rows_are_distinct_and_share_everything_else():
    jobs = ab.plan(ab.AblationConfig(seeds=[7]))
    assert len(jobs) == 26 == len({(j.framer, FramerConfig(**j.framer_options)) for j in jobs}) == len({j.run for j in jobs})
    rest = [{k: v for k, v in vars(j).items() if k not in ("run", "framer", "framer_options")} for j in jobs]
    assert all(one == rest[0] for one in rest) and rest[0]["seed"] == 7


def test_setup_columns_say_what_the_rows_do():
    for label, row, low, high in lines("4"):
        options = ab.ROWS[row]
        said = {"IntraCL": "intra", "InterCL": "inter", "\u00d7": None}
        if options is not None: assert (FramerConfig(**options).low, FramerConfig(**options).high) == (said[low], said[high]), label
    for label, row, faw, fam in lines("5"):
        if ab.ROWS[row] is not None: assert (FramerConfig(**ab.ROWS[row]).faw, FramerConfig(**ab.ROWS[row]).fam) == (faw == "\u2713", fam == "\u2713"), label


def test_paper_numbers_stand_in_one_place():
    "Best values of each table are the method's own line, as they are printed in bold; and no other source has such numbers."
    for table, best in {"2": "+CL-Freq Distill.", "3": "Ours: Final Teacher + Random Neg.", "4": "H (Ours)", "5": "FAW + FAM"}.items():
        for k, metric in enumerate(ab.PAPER_METRICS):
            values = {line: v[k] for line, v in ab.PAPER[table].items()}
            assert values[best] == (min if metric == "lpips" else max)(values.values()), (table, metric)
    for name in ("ablate", "hypotheses"):
        code = "".join("".join(c["source"]) for c in json.loads((ROOT / f"nbs/{name}.ipynb").read_text())["cells"])
        assert not re.search(r"\b(2[123]\.\d\d|6[5-9]\.\d\d|7[012]\.\d\d|0\.[45]\d\d)\b", code), name


# -- runs

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A project of few photographs."
    folder = tmp_path_factory.mktemp("project")
    for side, count in (("train", 3), ("val", 1)):
        (folder / "data/photographs" / side).mkdir(parents=True)
        for path in sorted((ROOT / "data/photographs" / side).glob("*.jpg"))[:count]: shutil.copy2(path, folder / "data/photographs" / side)
    return folder


@pytest.fixture
def here(root, monkeypatch):
    monkeypatch.setenv("FRAMER_ROOT", str(root))
    return root


QUICK = dict(rows=["baseline", "framer", "cl-freq"], seeds=[0], steps=2, size=64, validation_size=64, batch_size=2, sampling_steps=1, metrics=[], estimate=False)
ENVIRONMENT = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from framer import ablation as ab
    ab.run_ablation(ab.AblationConfig(**json.loads(sys.argv[1])))
"""


def finished(root): return sorted(p.parent.name for p in root.glob("reports/*/*/row.json"))
def workers_of(root): return [int(p.name) for p in Path("/proc").glob("[0-9]*") if b"multiprocessing" in _read(p / "cmdline") and os.fsencode(root) in _read(p / "environ")]
def _read(path):
    try: return path.read_bytes()
    except OSError: return b""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="skipped: looks for processes in /proc, which is not there")
def test_1_a_killed_ablation_leaves_its_finished_rows_and_no_worker(root):
    (root / "run.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, root / "run.py", json.dumps(dict(QUICK, run="a", workers=1))], env=dict(os.environ, FRAMER_ROOT=str(root), **ENVIRONMENT), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 600
        while not finished(root) and process.poll() is None and time.monotonic() < end: time.sleep(0.05)
        assert finished(root) == ["baseline-0"] and workers_of(root)
    finally: process.send_signal(signal.SIGKILL); process.wait(); process.stdout.close()
    end = time.monotonic() + 60
    while workers_of(root) and time.monotonic() < end: time.sleep(0.1)
    assert workers_of(root) == [] and not (root / "reports/a/cl-freq-0/row.json").exists()


def test_2_the_notebook_goes_on_in_parallel(root):
    "Finished rows are not run again; the others are trained two at a time."
    before = {name: (root / f"reports/a/{name}/row.json").stat().st_mtime_ns for name in finished(root)}
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/ablate.ipynb"), str(root / "reports/a/ablate.ipynb"), "-k", "python3", "--no-progress-bar", "-y", json.dumps(dict(QUICK, run="a", workers=2))]
    (root / "reports/a").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=root, env=dict(os.environ, FRAMER_ROOT=str(root), **ENVIRONMENT), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert finished(root) == ["baseline-0", "cl-freq-0", "framer-0"]
    assert all((root / f"reports/a/{name}/row.json").stat().st_mtime_ns == when for name, when in before.items())
    for name in ("ablation.json", "tables.csv", "table5.html", "table5.md", "table5.tex", "details.md", "differences-noise-loss.png"): assert (root / "reports/a" / name).is_file(), name
    found = json.loads((root / "reports/a/ablation.json").read_text())
    assert found["same_start"] is True and found["trained_at"]["threads"] == [1] and torch.__version__.startswith(found["environment"]["versions"]["torch"])
    assert [r for r in found["rows"]] == QUICK["rows"] and found["rows"]["framer"]["seeds"]["0"]["values"]["gate_hf"] is not None
    assert not list((root / "reports/a").glob("*/model")) and not list((root / "reports/a").glob("*/checkpoints"))


def test_3_parallel_rows_have_the_bits_of_sequential_ones(here):
    if not (here / "reports/a/framer-0/row.json").exists(): pytest.skip("skipped: needs the runs of test_2")
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        quick = ab.AblationConfig(**dict(QUICK, run="b", rows=["framer", "cl-freq"]))
        for job in ab.plan(quick): ab.run_row(job, quick)
    finally: torch.set_num_threads(threads)
    for row in quick.rows:
        one, other = (read_history(here / f"reports/{run}/{row}-0") for run in "ab")
        assert len(one) == 2 and history_differences(one, other) == []
        a, b = (json.loads((here / f"reports/{run}/{row}-0/row.json").read_text()) for run in "ab")
        assert a["scores"] == b["scores"] and a["statistics"] == b["statistics"] and a["threads"] == b["threads"] == 1
        assert a["similarity"] == b["similarity"] and len(a["similarity"]) == 18
        assert json.loads((here / f"reports/a/{row}-0/metrics.json").read_text())["similarity"] == json.loads((here / f"reports/b/{row}-0/metrics.json").read_text())["similarity"]


def test_4_a_changed_row_is_named_before_anything_runs(here):
    if not (here / "reports/a/framer-0/row.json").exists(): pytest.skip("skipped: needs the runs of test_2")
    for changed, words in [(dict(steps=3), "row baseline-0 .* steps is 3 now and was 2"), (dict(learning_rate=1e-4), "learning_rate"), (dict(framer_options=dict(weight=0.5)), "row framer-0 .*weight"), (dict(options=dict(preset="seesr_light")), "preset")]:
        with pytest.raises(RunError, match=words): ab.run_ablation(ab.AblationConfig(**{**QUICK, "run": "a", **changed}), log=lambda line: None)
    said = []
    assert ab.run_ablation(ab.AblationConfig(**dict(QUICK, run="a", workers=2, metrics=["lpips"])), said.append) == {} and "3 are finished, 0 to train" in said[0]


def test_a_row_that_stops_being_a_number_is_a_result(here, monkeypatch):
    def diverges(config): raise FloatingPointError("step 1: the noise loss is nan")
    monkeypatch.setattr(ab, "train", diverges)
    quick = ab.AblationConfig(**dict(QUICK, run="nan", rows=["mse"])); job, = ab.plan(quick)
    assert ab.run_row(job, quick)["failed"] == "step 1: the noise loss is nan"
    (run_path(job.run) / "config.json").write_text(json.dumps(dict(config=vars(job), environment={})))
    numbers = ab.row_numbers(job.run)
    assert numbers["values"] == {} and "nan" in numbers["why"]
    assert "nan" in ab.sheet_markdown(ab.sheet(ab.collect(quick), "2"))


def test_a_test_set_takes_the_place_of_held_out_crops(here):
    job, source = "c/framer-0", here / "reports/b/framer-0"
    files = ("config.json", "metrics.json", "history.csv")
    if lost := [name for name in (*files, "row.json") if not (source / name).is_file()]: pytest.skip(f"skipped: needs the runs of test_3, which left no {', '.join(lost)}")
    folder = run_path(job); folder.mkdir(parents=True, exist_ok=True)
    for name in files: shutil.copy2(source / name, folder)
    record = json.loads((here / "reports/b/framer-0/row.json").read_text())
    (folder / "row.json").write_text(json.dumps(dict(record, test=dict(means=dict(psnr=20.5), missing={}, count=1, protocol="framer", versions={}))))
    assert ab.row_numbers(job)["values"]["psnr"] == 20.5 and ab.row_numbers("b/framer-0")["values"]["psnr"] != 20.5


# -- tables

@pytest.fixture(scope="module")
def made_up():
    "Numbers with gaps: a row was not run, a metric has no weights, one seed diverged, a value is negative zero."
    value = lambda k, s: dict(psnr=20 + 0.1 * s + 0.5 * k, lpips=0.5 - 0.01 * k, noise_loss=1 - 0.1 * k + 0.001 * s * k, hf_middle=0.1 * k)
    rows = {row: dict(options=ab.ROWS[row], seeds={str(s): dict(values=value(k, s), missing={"musiq": "not available: m.pth"}, why="") for s in range(3)}) for k, row in enumerate(["baseline", "cl-freq", "faw", "framer"])}
    rows["faw"]["seeds"]["1"] = dict(values={}, missing={}, why="step 9: the noise loss is nan")
    return dict(format=1, parameters=vars(ab.AblationConfig(tables=["5", "3"])), trained_at=dict(commits=["0123456789abcdef"], hardware=[dict(cpu="a processor", gpus=[])], threads=[1]), rows=rows, environment={}, seconds=0, same_start=True)


def test_layout_is_the_papers(made_up):
    sheet = ab.sheet(made_up, "5", ("psnr", "musiq", "noise_loss"))
    assert [cells[0].text for _, cells in sheet.lines] == ["Baseline", "CL only", "FAW only", "FAM only", "FAW + FAM"]
    assert [c.text for c in sheet.lines[0][1]] == ["Baseline", "\u00d7", "\u00d7", "20.10 \u00b1 0.10", "-", "1.0000 \u00b1 0.0000", "21.94", "0.41", "67.67", "0.459"]
    assert [g for g, _ in sheet.groups][2] == "Paper, Table 5: RealSR, DiT4SR at 128 to 512 pixels, pretrained SD 3"
    full = sheet.lines[4][1]
    assert full[3].best and full[3].text == "21.60 \u00b1 0.10" and full[3].below == "+1.500"           # no spread of the difference: no test, no star
    assert full[5].below == "-0.29700*" and full[5].best                                                # lower is better, and beyond chance
    assert not any(c.best for _, cells in sheet.lines for c in cells[6:])                               # the paper's values are not ranked
    notes = {text for text in sheet.notes}
    assert notes == {"not available: m.pth", "seed 1: step 9: the noise loss is nan", "not run", "seed 0: not available: m.pth; seed 1: step 9: the noise loss is nan; seed 2: not available: m.pth"}
    assert "0123456789" in sheet.caption and "a processor" in sheet.caption and "cannot be set against" in sheet.caption
    part = ab.sheet(made_up, "3")
    assert [s for s, _ in part.lines][0].startswith("Part 1") and "Part 2" in part.lines[3][0] and part.lines[4][1][1].text == "20.60 \u00b1 0.10"


def test_rows_that_are_one_are_named(made_up):
    twins = dict(made_up, rows={**made_up["rows"], "radius-0.1": made_up["rows"]["framer"]})
    assert ab.same_rows(made_up) == [] and ab.same_rows(twins) == [["framer", "radius-0.1"]]
    assert ab.conclusions(twins)[-1] == "The same in every number, as printed: framer, radius-0.1."


def test_writers_agree_and_escape(made_up):
    sheet = ab.sheet(made_up, "5")
    sheet.notes["<b>&_%"] = "z"
    html, md, tex = ab.sheet_html(sheet), ab.sheet_markdown(sheet), ab.sheet_latex(sheet)
    assert html.count("<tr>") == 7 and "&lt;b&gt;&amp;" in html and html.count("class=paper") == 5 * 4 + 1
    assert "| **21.60 \u00b1 0.10**<br>+1.500 |" in md and "paper: MUSIQ" in md
    assert r"\textbf{21.60 $\pm$ 0.10}" in tex and r"\checkmark & $\times$" in tex and r"\_\%" in tex
    assert {line.count(" & ") for line in tex.splitlines() if line.startswith(("FAW", "CL", "FAM", "Baseline"))} == {len(sheet.heads) - 1}


def test_csv_keeps_the_paper_in_its_own_columns(made_up):
    rows = list(csv.DictReader(io.StringIO(ab.tables_csv(made_up, ["5"]))))
    assert len(rows) == 5 * len(ab.COLUMNS)
    psnr = {r["line"]: r for r in rows if r["column"] == "psnr"}
    assert psnr["FAW only"]["n"] == "2" and psnr["FAW only"]["paper_value"] == "22.93" and psnr["FAW only"]["gap"] == "seed 1: step 9: the noise loss is nan"
    assert psnr["FAM only"]["mean"] == "" and psnr["FAM only"]["gap"] == "not run"
    assert float(psnr["FAW + FAM"]["difference_to_baseline"]) == pytest.approx(1.5) and psnr["FAW + FAM"]["paper_data"].startswith("Table 5: RealSR")
    assert all(r["paper_value"] == "" for r in rows if r["column"] not in ab.PAPER_METRICS)


# -- verdicts

def verdicts(root, monkeypatch):
    "Run the page's cells as they stand; the findings."
    monkeypatch.setenv("FRAMER_ROOT", str(root))
    names = {}
    for cell in json.loads((ROOT / "nbs/hypotheses.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code": exec("".join(cell["source"]), names)
    return {f.claim: f for f in names["findings"]}


def test_hypotheses_on_the_committed_files(monkeypatch):
    found = verdicts(ROOT, monkeypatch)
    assert len(found) == 13 and all(f.verdict in ab.VERDICTS and f.criterion for f in found.values())
    if not (ROOT / "reports/ablation/ablation.json").is_file(): pytest.skip("skipped in part: reports/ablation is not there")
    assert all(f.measured and f.scale for f in found.values() if f.verdict != "not measured yet")


def test_hypotheses_without_files(tmp_path, monkeypatch):
    found = verdicts(tmp_path, monkeypatch)
    assert {f.verdict for f in found.values()} == {"not measured yet"} and len(found) == 13


def test_hypotheses_follow_from_the_numbers(tmp_path, monkeypatch, made_up):
    "The same page on files in which FRAMER works, and on files in which it harms."
    for sign, expected in [(1, "holds"), (-1, "does not hold")]:
        value = lambda k, s: dict(psnr=20 + sign * 0.5 * k + 0.01 * s * (k + 1), noise_loss=1 - sign * 0.1 * k + 0.001 * s * (k + 1), hf_middle=0.3 + sign * 0.1 * k + 0.001 * s * (k + 1))
        statistic = dict(timestep=300.0, samples=4, dominance=2.0 ** sign, cross_lf=0.5 + 0.3 * sign, cross_hf=0.5 - 0.4 * sign)
        order = [*[r for r in ab.ROWS if r not in ("cl-freq", "faw", "fam", "framer")], "cl-freq", "faw", "fam", "framer"]
        rows = {row: dict(options=ab.ROWS[row], seeds={str(s): dict(values=value(k, s), missing={}, why="", statistics=[dict(statistic, what="pixels", timestep=None), dict(statistic, what="layer")]) for s in range(3)}) for k, row in enumerate(order)}
        (tmp_path / "reports/ablation").mkdir(parents=True, exist_ok=True)
        (tmp_path / "reports/ablation/ablation.json").write_text(json.dumps(dict(made_up, rows=rows)))
        found = verdicts(tmp_path, monkeypatch)
        for claim in ("The final layer is the best teacher", "A random layer is the better negative", "FAW and FAM together are better than either", "Low frequencies dominate", "LF is shared across samples, HF is specific to the instance"):
            assert found[claim].verdict == expected, (claim, found[claim])
        assert found["LF aligns first, HF late"].verdict == "not measured yet"   # no pair of runs
    (tmp_path / "reports/ablation/ablation.json").write_text("{")
    with pytest.raises(ValueError, match="ablation.json is not JSON"): verdicts(tmp_path, monkeypatch)
