"""The page, in a real Chromium that is driven over WebDriver (w3.org/TR/webdriver2), plain HTTP."""

import base64
import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import forked
import pytest
from conftest import TINY, make_text
from test_rows import BYTES, talk

import prepare
import train as script

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    not (DRIVER and CHROMIUM), reason="no Chromium: apt-get install chromium chromium-driver"
)
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = "<img src=x onerror='window.hit=1'><script>window.hit=1</script>"


class Browser:
    """One window of Chromium. `run` runs JavaScript in the page."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(filter(None, (re.search(r"on port (\d+)\.", x) for x in self.process.stdout)))
        self.address = f"http://127.0.0.1:{port[1]}/session"
        arguments = [*QUIET, f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        arguments[-1] += ", EXCLUDE 127.0.0.1"
        wanted = {"goog:chromeOptions": {"args": arguments, "binary": CHROMIUM}}
        wanted["goog:loggingPrefs"] = dict(browser="ALL", performance="ALL")
        session = self.call("", capabilities=dict(alwaysMatch=wanted))
        self.address += "/" + session["sessionId"]

    def call(self, path: str, method: str = "POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, code: str, *arguments):
        return self.call("/execute/sync", script=code, args=[*arguments])

    def wait(self, condition: str, seconds: float = 20) -> None:
        late = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < late, (
                f"{condition}: {self.run('return document.body.innerText')}"
            )
            time.sleep(0.02)

    def command(self, name: str, **settings):
        return self.call("/goog/cdp/execute", cmd=name, params=settings)

    def log(self, kind: str) -> list[dict]:
        return self.call("/se/log", type=kind)

    def width(self, pixels: int) -> None:
        size = dict(width=pixels, height=800, deviceScaleFactor=1, mobile=False)
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def speak(self, language: str) -> None:
        agent = self.run("return navigator.userAgent")
        settings = dict(userAgent=agent, acceptLanguage=language)
        self.command("Emulation.setUserAgentOverride", **settings)

    def picture(self) -> bytes:
        return base64.b64decode(self.call("/screenshot", "GET"))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.call("", "DELETE")
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server whose tiny model knows conversations, and two tasks."""
    folder = tmp_path_factory.mktemp("page")
    rows = [
        json.dumps(talk(f"say {i}", line, task="ab"[i % 2]))
        for i, line in enumerate(make_text(300).splitlines())
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    prepare.main([str(folder / "rows.jsonl"), f"--out={folder / 'rows'}", *BYTES])
    (folder / "tiny.py").write_text("")
    argv = [str(folder / "tiny.py"), f"--data={folder / 'rows'}", f"--out={folder / 'run'}"]
    assert script.main([*argv, *TINY, "--block_size=512", "--batch_tokens=512"]) == 0
    process = forked.Forked("serve.py", folder / "run", "--port=0", "--threads=1")
    try:
        lines = (re.search(r"serving on (\S+)", line) for line in process.stdout)
        yield next(filter(None, lines))[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.end()


@pytest.fixture
def page(chromium, server):
    """The page, just opened. Whatever a test does, nobody complains, and nobody else is asked."""
    chromium.width(1200)
    chromium.log("browser"), chromium.log("performance")
    chromium.call("/url", url=server)
    chromium.wait("following && document.title === 'run'")
    yield chromium
    assert chromium.log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in chromium.log("performance")]
    sent = [
        x["params"]["request"]["url"] for x in sent if x["method"] == "Network.requestWillBeSent"
    ]
    assert len(sent) > 2 and all(url.startswith((server, "data:")) for url in sent)
    assert chromium.run("return window.hit") is None


def ask(page, text: str, tokens: int = 20, temperature: float = 1) -> None:
    """Types, and sends with Ctrl+Enter."""
    move(page, "temperature", temperature)
    page.run("at('most').value = arguments[0]; at('typed').value = arguments[1]", tokens, text)
    keys = "new KeyboardEvent('keydown', {key: 'Enter', ctrlKey: true, cancelable: true})"
    page.run(f"at('typed').dispatchEvent({keys})")


def move(page, slider: str, value: float) -> None:
    moved = "at(arguments[0]).value = arguments[1];"
    page.run(moved + "at(arguments[0]).dispatchEvent(new Event('input'))", slider, value)


def finished(page) -> None:
    page.wait("!writing && following")


def pieces(page, of: str = "text") -> list:
    return page.run(f"return turns.flatMap(turn => turn.pieces).map(piece => piece.{of})")


def text(page) -> str:
    return page.run("return at('text').textContent")


def rows(page) -> list[str]:
    return page.run("return [...at('candidates').children].map(row => row.innerText)")


def chat(page) -> None:
    page.run("following = null; at('chat').click()")


def pretend(page, *parts: bytes, status: int = 200) -> None:
    """From now on the server says this, in these parts, whatever it is asked."""
    parts = [[*part] for part in parts]
    code = """
    const [parts, status] = arguments;
    window.fetch = async () => new Response(new ReadableStream({
      async start(controller) {
        for (const part of parts) {
          controller.enqueue(Uint8Array.from(part));
          await new Promise((done) => setTimeout(done, 10));
        }
        controller.close();
      },
    }), { status });"""
    page.run(code, parts, status)


def event(*words: tuple[str, bytes], text: str, finish=None) -> bytes:
    """A chunk of a completion, with words of probability 1/2, one id each."""
    n = len(words)
    found = dict(tokens=[*words], token_logprobs=[-0.693] * n, top_logprobs=[{}] * n)
    choice = dict(text=text, token_ids=[7] * n, logprobs=found, finish_reason=finish)
    return b"data: " + json.dumps(dict(choices=[choice]), ensure_ascii=False).encode() + b"\r\n\r\n"


# --- text


def test_text_is_seen_while_it_comes_and_stop_keeps_it(page):
    ask(page, "the model ", tokens=500, temperature=0)
    page.wait("turns[0]?.pieces.length > 8")
    assert page.run("return at('go').textContent") == "Stop"
    page.run("at('go').click()")
    finished(page)
    kept = text(page)
    assert kept.startswith("the model ") and 8 < len(pieces(page)) < 450
    assert page.run("return at('status').textContent").endswith("stopped")
    assert page.run("return at('go').textContent") == "Write"
    time.sleep(0.3)
    assert text(page) == kept == "".join(pieces(page))  # nothing comes any more
    ask(page, "", tokens=5, temperature=0)  # and it goes on from there
    finished(page)
    assert text(page).startswith(kept) and len(pieces(page)) > 9


def test_every_token_has_its_probability_as_colour(page):
    ask(page, "x", tokens=12, temperature=0)
    finished(page)
    colours = (
        "[...document.querySelectorAll('.token')].map(x => getComputedStyle(x).backgroundColor)"
    )
    assert len({*page.run(f"return {colours}")}) > 2
    shades = page.run(
        f"return {colours.split('.map')[0]}.map(x => x.style.getPropertyValue('--shade'))"
    )
    sure = [2.718281828**p for p in pieces(page, "logprob")[1:]]
    assert [float(x) ** 2 for x in shades] == pytest.approx(sure, rel=1e-3)
    assert "%" in page.run("return document.querySelector('.token').title")


def test_a_character_of_several_tokens_is_one_piece(page):
    parts = [r"bytes:\xe6", r"bytes:\x96"]
    end = event(r"bytes:\x87", "b", text="文b", finish="length")
    whole = event("a", *parts, text="a") + b": still here\r\n\r\n" + end + b"data: [DONE]\n\n"
    pretend(page, *(whole[i : i + 7] for i in range(0, len(whole), 7)))  # also inside 文 and \r\n
    ask(page, "x")
    page.wait("!writing && turns[0].pieces.length === 4")
    assert pieces(page) == ["x", "a", "文", "b"]
    assert pieces(page, "ids")[1:] == [[7], [7, 7, 7], [7]]
    assert pieces(page, "logprob")[2] == pytest.approx(3 * -0.693)


def test_what_the_server_masks_has_no_probability(page):
    whole = event("a", text="a***b") + event("b", text="") + b"data: [DONE]\n\n"
    pretend(page, whole)
    ask(page, "x")
    page.wait("!writing && turns[0].pieces.length === 4")
    assert pieces(page) == ["x", "a", "***", "b"]
    assert pieces(page, "logprob")[2] is None
    assert page.run("return promptOf(turns)") == dict(prompt="xa***b")  # ids would tell too much


# --- alternatives


def test_a_click_shows_ten_alternatives_and_generation_goes_on_from_one(page):
    ask(page, "the ", tokens=30, temperature=0)
    finished(page)
    before = pieces(page)
    page.run("following = null; document.querySelectorAll('.token')[9].click()")
    page.wait("following")
    shown = rows(page)
    assert len(shown) == 10 and all("%" in row for row in shown)
    stood = f"“{before[10].replace(' ', '·')}”"
    assert stood in page.run("return at('where').textContent")
    assert shown[0].split()[0] == before[10].replace(" ", "·")  # at temperature 0
    free = "[...document.querySelectorAll('#candidates button:enabled')].slice(1)[0]"
    other = page.run(f"return {free}.querySelector('b').textContent").replace("·", " ")
    page.run(f"following = null; {free}.click()")
    finished(page)
    after = pieces(page)
    assert after[:11] == [*before[:10], other] and after != before and len(after) > 12
    assert page.run("return turns[0].pieces.every((piece) => piece.ids)")  # the tokens themselves


def test_in_a_chat_the_answer_goes_on_from_an_alternative(page):
    chat(page)
    ask(page, "say it", tokens=12, temperature=0)
    finished(page)
    assert page.run("return turns.map(turn => turn.role)") == ["user", "assistant"]
    before = pieces(page)
    assert len(before) > 6
    page.run("following = null; document.querySelectorAll('.token')[3].click()")
    page.wait("following")
    page.run("following = null; document.querySelectorAll('#candidates button:enabled')[1].click()")
    finished(page)
    after = pieces(page)
    assert after[:4] == before[:4] and after[4] != before[4] and len(after) > 5
    assert page.run("return at('problem').hidden")


# --- distribution


def test_sliders_show_the_distribution_at_once_and_ask_nobody(page):
    ask(page, "the model ", tokens=1, temperature=1)
    finished(page)
    asked = page.run("return performance.getEntriesByType('resource').length")
    state = page.run("return following")
    at_one = [2.718281828 ** c["logprob"] for c in state["candidates"]]
    by = "return probabilities(following, arguments[0], arguments[1])"
    assert page.run(by, 1, 1) == pytest.approx(at_one, rel=1e-3)
    assert page.run(by, 0, 1)[:3] == [1, 0, 0]
    half = [p**2 for p in at_one]  # what temperature 1/2 means; 64 of 262 have nearly all of it
    found = page.run(by, 0.5, 1)
    assert found[1] / found[0] == pytest.approx(half[1] / half[0], rel=1e-3)
    few = page.run(by, 1, at_one[0] + at_one[1] / 2)  # the first alone does not reach it
    assert few[0] == pytest.approx(at_one[0] / sum(at_one[:2]), rel=1e-3) and few[2] == 0
    seen = [rows(page)]
    for slider, value in [("temperature", 0.4), ("share", 0.05), ("temperature", 0)]:
        move(page, slider, value)
        seen.append(rows(page))
        assert f"{value:.2f}" in page.run("return at('next').innerText")
    assert seen[0] != seen[1] != seen[2] and "100%" in seen[3][0]
    assert page.run("return performance.getEntriesByType('resource').length") == asked


def test_attention_and_loss_are_drawn(page):
    ask(page, "the model ", tokens=9, temperature=0)
    finished(page)
    page.run("at('attention').open = true")
    page.wait("attention")
    words = page.run("return [...at('words').children].map(word => word.textContent)")
    assert "".join(words).startswith("the model ") and len(words) >= 19
    shades = (
        "return [...at('words').children].map(word => Number(word.style.getPropertyValue('--w')))"
    )
    last = page.run(shades)
    page.run("at('words').children[2].dispatchEvent(new Event('mouseover', {bubbles: true}))")
    third = page.run(shades)
    assert max(last) == max(third) == 1 and third != last
    assert third[3:] == [0] * (len(words) - 3)  # nothing from what comes later
    assert page.run("return at('matrix').width") == len(words)
    drawn = page.run("return at('loss').innerHTML")
    assert 'class="training"' in drawn and 'class="validation"' in drawn and "8</text>" in drawn


# --- safety


def test_markup_of_the_user_and_of_the_model_is_text(page):
    ask(page, HOSTILE, tokens=2, temperature=0)
    finished(page)
    assert text(page).startswith(HOSTILE)
    page.run("at('attention').open = true")
    page.wait("attention")
    chunk = event(HOSTILE, text=HOSTILE) + event(text="", finish="stop") + b"data: [DONE]\n\n"
    pretend(page, chunk)
    ask(page, "", tokens=2)
    page.wait("!writing")
    assert text(page).count(HOSTILE) == 2
    candidate = dict(id=1, text=HOSTILE, logprob=-1)
    answer = dict(candidates=[candidate], temperatures=[1], normalisers=[0])
    answer |= dict(words=[HOSTILE], weights=[[1]], models=[HOSTILE], layers=HOSTILE, losses=[])
    pretend(page, json.dumps(answer).encode())
    page.run("look(); attend()")
    page.wait("following?.candidates.length === 1 && attention?.words.length === 1")
    assert page.run("return at('words').textContent") == HOSTILE
    assert page.run("return document.querySelector('#candidates b').textContent").startswith("<img")
    page.run("enter()")
    page.wait(f"document.title === {json.dumps(HOSTILE)}")
    pretend(page, json.dumps(dict(error=dict(message=HOSTILE))).encode(), status=400)
    ask(page, "x")
    page.wait("!at('problem').hidden")
    assert page.run("return document.querySelectorAll('img, script').length") == 1
    time.sleep(0.1)  # for window.hit, which `page` reads


def test_the_policy_lets_nothing_else_run(page):
    page.run("document.addEventListener('securitypolicyviolation', (e) => window.refused = e)")
    code = "const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
    page.run(code + "document.body.append(s)")
    page.wait("window.refused")
    assert page.run("return fetch('http://localhost:1/').then(() => 1, () => 0)") == 0
    said = page.log("browser")
    assert len(said) >= 2 and all("Content Security Policy" in entry["message"] for entry in said)
    page.log("performance")
    page.call("/refresh")
    page.wait("following")


def test_what_the_server_refuses_is_said(page):
    ask(page, "x" * 3000)
    page.wait("!writing && !at('problem').hidden")
    assert "context" in page.run("return at('problem').textContent")
    page.wait("at('where').textContent.includes('context')")
    assert all("status of 400" in entry["message"] for entry in page.log("browser"))
    pretend(page, b'data: {"error": {"message": "the model failed"}}\n\n')
    page.run("at('again').click()")
    page.wait("at('problem').textContent === 'the model failed'")
    pretend(page, event("a", text="a"))
    page.run("at('again').click()")
    page.wait("at('problem').textContent.includes('connection ended')")
    assert pieces(page)[1:] == ["a"]


def test_a_key_is_asked_for_and_kept_for_the_session_alone(page):
    pretend(page, b'{"error": {"message": "a key is needed"}}', status=401)
    page.run("enter()")
    page.wait("!at('door').hidden")
    assert page.run("return at('problem').textContent") == "a key is needed"
    seen = (
        "window.fetch = async (path, how) => { window.given = how.headers.Authorization; throw 0 }"
    )
    page.run(seen + "; at('key').value = 'sk-1'; at('door').requestSubmit()")
    page.wait("window.given")
    assert page.run("return [window.given, localStorage.length]") == ["Bearer sk-1", 0]
    page.run("sessionStorage.clear()")


# --- looks


@pytest.mark.parametrize("language, words", [("en-GB", "The next token"), ("zh-CN", "下一个词元")])
def test_it_speaks_the_browsers_language_and_fits_a_phone(page, language, words):
    page.speak(language)
    page.width(360)
    page.call("/refresh")
    page.wait("following")
    chat(page)
    ask(page, "long " * 30 + "x" * 200, tokens=9, temperature=0)
    finished(page)
    page.run("at('attention').open = true")
    page.wait("attention")
    assert words in page.run("return document.body.innerText")
    assert page.run("return document.documentElement.lang") == language[:2]
    right = "[...document.querySelectorAll('body *')].map(x => x.getBoundingClientRect().right)"
    assert page.run(f"return Math.max(document.body.scrollWidth, ...{right})") <= 360
    missing = (
        "Object.entries(SAYINGS).filter(([, pair]) => pair.length !== 2 || !pair[0] || !pair[1])"
    )
    assert page.run(f"return {missing}") == []
    page.speak("en")


def test_light_and_dark(page):
    paper = "return getComputedStyle(document.body).backgroundColor"
    seen = set()
    for scheme in ("light", "dark"):
        feature = dict(name="prefers-color-scheme", value=scheme)
        page.command("Emulation.setEmulatedMedia", features=[feature])
        seen.add(page.run(paper))
        assert page.picture().startswith(b"\x89PNG")
    assert len(seen) == 2
    page.command("Emulation.setEmulatedMedia", features=[])


def test_the_keyboard_reaches_every_token(page):
    ask(page, "the ", tokens=6, temperature=0)
    finished(page)
    press = "arguments[0] && document.activeElement.dispatchEvent("
    press += "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true, cancelable: true}))"
    page.run("at('text').focus()")
    for key in ["ArrowRight", "ArrowRight", "Enter"]:
        page.run(press, key)
    page.wait("chosen")
    assert page.run("return chosen") == [0, 2]
    unnamed = "[...document.querySelectorAll('button, input, select, textarea')].filter("
    unnamed += "x => !x.labels?.length && !x.textContent && !x.getAttribute('aria-label'))"
    assert page.run(f"return {unnamed}.length") == 0
