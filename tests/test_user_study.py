"The user study's page in a real browser, from the first click to the exported file, and the job notebook around it."
import json, os, shutil, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

np, Image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
ROOT = Path(__file__).parents[1]
CHROMIUM = next((c for c in ("chromium", "chromium-browser", "google-chrome") if shutil.which(c)), None)
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install Debian's `chromium` package to run the browser tests")
CENTRE = "(e => { e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })(document.querySelector(%s))"


class Browser:
    "Headless Chromium through its DevTools socket: real mouse, key and touch events."
    def __init__(self, folder):
        websocket = pytest.importorskip("websocket", reason="websocket-client (it comes with JupyterLab) drives the browser")
        self.downloads, profile = folder / "downloads", folder / "profile"
        self.downloads.mkdir(exist_ok=True)
        (profile / "DevToolsActivePort").unlink(missing_ok=True)
        self.process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--remote-debugging-port=0", "--remote-allow-origins=*",
                                         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}", "--window-size=1200,900", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self.wait(lambda: (profile / "DevToolsActivePort").exists() and (profile / "DevToolsActivePort").read_text().split()[0], "the browser's port")
        pages = self.wait(lambda: [t for t in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")) if t["type"] == "page"], "a page")
        self.socket, self.count, self.events = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=60), 0, []
        for domain in ("Page", "Network", "Runtime", "Log"): self(f"{domain}.enable")
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __call__(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count: break
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    @staticmethod
    def wait(ready, what, seconds=60):
        for _ in range(seconds * 20):
            try:
                if found := ready(): return found
            except (OSError, IndexError): pass
            time.sleep(0.05)
        pytest.fail(f"{what} did not come within {seconds} s")

    def js(self, code):
        result = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path):
        self("Page.navigate", url=path.as_uri()); self.wait(lambda: self.js("document.readyState === 'complete' && !!document.getElementById('keys')?.children.length"), "the page")

    def click(self, selector):
        x, y = self.js(CENTRE % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"): self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, selector):
        x, y = self.js(CENTRE % json.dumps(selector))
        self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=x, y=y)]); self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, key, code=None):
        text = key if len(key) == 1 else "\r" if key == "Enter" else ""
        number = {"Enter": 13, "Tab": 9, "ArrowLeft": 37}.get(key, ord(key.upper()) if len(key) == 1 else 0)
        self("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=number, **(dict(text=text) if text else {})); self("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=number)

    def text(self, selector): return self.js(f"document.querySelector({json.dumps(selector)}).textContent")
    def shown(self): return self.js("document.querySelector('#views [aria-pressed=true]').dataset.name")

    def close(self):
        try: self("Browser.close")
        except Exception: self.process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "Two tracks, three scenes; the methods paint the picture in their own colour, so that a screen can be read back."
    from framer.study import make_study
    folder = tmp_path_factory.mktemp("study")
    for method, colour in dict(gt=(128, 128, 128), red=(200, 30, 30), green=(30, 200, 30), blue=(30, 30, 200)).items():
        (folder / method).mkdir()
        for scene in ("bridge", "cat", "door"): Image.new("RGB", (64, 48), colour).save(folder / method / f"{scene}.png")
    tracks = {"first": {m: folder / m for m in ("red", "green", "blue")}, "second": {m: folder / m for m in ("red", "blue")}}
    key = make_study(folder / "study", tracks, folder / "gt", scenes=None, title="Which one?", about="A test.")
    return folder / "study/study.html", key


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path)
    yield found
    found.close()


def vote_for(key, page, wanted):
    "Which candidate of a page a participant wants, and its place."
    return next(c for c, m in key["pages"][page]["candidates"].items() if m == wanted)


def exported(browser):
    file = browser.wait(lambda: [p for p in browser.downloads.glob("study-*.json") if p.stat().st_size], "the exported file")[-1]
    return file, json.loads(file.read_text())


@browser_only
def test_from_the_first_click_to_the_file(browser, study):
    from framer.study import read_answers, win_rates
    page, key = study
    browser.open(page)
    browser.js("document.getElementById('code').value = 'ann'; document.getElementById('code').oninput()")
    browser.click("#start")
    assert browser.text("#where") == "Picture 1 of 6" and browser.shown() == "A"
    # looking: candidates, the reference, zoom by wheel and keys, before and after
    browser.key("2"); assert browser.shown() == "B"
    browser.key("r"); assert browser.shown() == "Reference"
    browser.key("p"); assert browser.js("Object.keys(state.answers[0].choices).length") == 0, "the reference takes no vote"
    browser.click("#views button:nth-child(1)"); assert browser.shown() == "A"
    before = float(browser.js("stage.dataset.scale")); x, y = browser.js(CENTRE % '"#stage"')
    browser("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-400)
    browser.wait(lambda: float(browser.js("stage.dataset.scale")) > 2 * before, "the zoom")
    browser.key("0"); assert float(browser.js("stage.dataset.scale")) == pytest.approx(before)
    browser.click("#compare"); assert browser.js("document.querySelectorAll('#stage img').length") == 2 and browser.text("#left") == "Reference" and browser.text("#right") == "A"
    assert browser.js("getComputedStyle(document.querySelectorAll('#stage img')[1]).clipPath").startswith("inset(") and not browser.js("document.querySelector('#split').hidden")
    browser.key("s"); assert browser.js("document.querySelector('#split').hidden")
    assert browser.js("document.querySelector('#next').disabled")
    # answering by keyboard, except the first question of each page by mouse; a reload in the middle loses nothing
    for number in range(6):
        answer = browser.js("state.answers[state.at]")
        want = vote_for(key, answer["page"], "red")
        place = answer["order"].index(want)
        browser.click(f"#questions fieldset:nth-child(1) label:nth-of-type({place + 1}) input")
        browser.key(str(place + 1)); browser.key("p"); browser.key("o")
        if number == 2:
            browser.open(page)
            assert "2 of 6" in browser.text("#found") or "3 of 6" in browser.text("#found"); browser.click("#start")
            assert browser.text("#where") == "Picture 3 of 6"
        assert not browser.js("document.querySelector('#next').disabled"), browser.text("#todo")
        browser.key("n") if number % 2 else browser.click("#next")
    assert not browser.js("document.querySelector('#end').hidden")
    browser.click("#export")
    file, data = exported(browser)
    assert data["complete"] and data["participant"] == "ann" and len(data["answers"]) == 6 and all(a["seconds"] > 0 for a in data["answers"])
    votes = read_answers([file], key)
    assert len(votes) == 18 and {v["method"] for v in votes} == {"red"}
    assert all(r["rate"] == (100 if r["method"] == "red" else 0) for r in win_rates(votes, key, resamples=20))
    fetched = [e["params"]["request"]["url"].split(":")[0] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert set(fetched) <= {"file", "data", "blob"}, fetched
    assert not [e for e in browser.events if e["method"] == "Runtime.exceptionThrown" or e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] == "error"]


@browser_only
def test_on_a_phone_with_fingers(browser, study):
    from framer.study import read_answers
    page, key = study
    browser("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=3, mobile=True)
    browser("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.open(page)
    browser.js("document.getElementById('code').value = 'bo'; document.getElementById('code').oninput()")
    browser.tap("#start"); browser.wait(lambda: browser.js("!document.querySelector('#page').hidden"), "the first picture")
    assert browser.js("document.documentElement.scrollWidth <= 360"), "the page is wider than the phone"
    assert browser.js("Math.min(...[...document.querySelectorAll('#page button')].map(b => b.offsetHeight)) >= 44"), "buttons are too small for a finger"
    x, y = browser.js(CENTRE % '"#stage"'); before = float(browser.js("stage.dataset.scale"))
    browser("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=x - 20, y=y, id=0), dict(x=x + 20, y=y, id=1)])
    browser("Input.dispatchTouchEvent", type="touchMove", touchPoints=[dict(x=x - 60, y=y, id=0), dict(x=x + 60, y=y, id=1)])
    browser("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert float(browser.js("stage.dataset.scale")) > 2 * before, "two fingers do not zoom"
    for fieldset in (1, 2): browser.tap(f"#questions fieldset:nth-child({fieldset}) label:nth-of-type(2) input")
    browser.wait(lambda: browser.js("Object.keys(state.answers[0].choices).length") == 2, "two votes")
    browser.tap("#export-now")   # before the end: what is there is saved, and says that it is not all
    file, data = exported(browser)
    told = []
    votes = read_answers([file], key, log=told.append)
    assert not data["complete"] and len(votes) == 2 and {v["place"] for v in votes} == {1} and "16 of 18" in told[0]


@browser_only
def test_order_follows_from_the_participant(browser, study):
    page, key = study
    browser.open(page)
    orders = browser.js("JSON.stringify([...Array(60).keys()].map(k => fresh('person' + k).answers.map(a => [a.page, a.order])))")
    orders = json.loads(orders)
    assert browser.js("JSON.stringify(fresh('x').answers) === JSON.stringify(fresh('x').answers)")
    assert len({json.dumps(o) for o in orders}) == 60, "two people see one order"
    three = [order for o in orders for p, order in o if len(order) == 3]
    first = [order.index(vote_for(key, p, "red")) for o in orders for p, order in o if len(order) == 3]
    assert all(abs(first.count(k) / len(first) - 1 / 3) < 0.12 for k in range(3)), "a candidate keeps its place"
    assert {p for p, _ in orders[0]} == set(key["pages"]) and len({o[0][0] for o in orders}) > 3 and three


def test_notebook_makes_the_page_and_then_the_table(tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    run = tmp_path / "reports/study"; run.mkdir(parents=True)
    def papermill(**parameters):
        command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/user_study.ipynb"), str(run / "user_study.ipynb"), "-k", "python3", "--no-progress-bar", "-p", "run", "study"]
        for k, v in parameters.items(): command += ["-p", k, str(v)]
        return subprocess.run(command, cwd=tmp_path, env=dict(os.environ, FRAMER_ROOT=str(tmp_path), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    done = papermill()
    assert done.returncode == 0, done.stderr[-2000:]
    key = json.loads((run / "study/key.json").read_text())
    page = (run / "study/study.html").read_text()
    assert "bicubic" not in page and "Lanczos" not in page and not (run / "table7.md").exists()
    answers = [dict(page=p, order=sorted(v["candidates"]), seconds=1, choices={q["id"]: vote_for(key, p, "Lanczos") for q in key["questions"]}) for p, v in key["pages"].items()]
    (run / "answers").mkdir(); (run / "answers/a.json").write_text(json.dumps(dict(study=key["study"], participant="a", answers=answers)))
    done = papermill()
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run / "study/key.json").read_text()) == key, "the key changed under its answers"
    assert "**100.0 (100-100)**" in (run / "table7.md").read_text() and (run / "table7.tex").exists() and (run / "table7.png").exists()
