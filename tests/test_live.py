"""docs/learn/page.html: the specimen in a real Chromium computes what it computes in torch."""

import json

import pytest
import test_page
import torch
from test_page import HOSTILE, Browser, move, pytestmark  # noqa: F401

from lessons import live, specimen

TEXT = "nutshell|nutsh"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("live"))
    yield browser
    browser.end()


@pytest.fixture
def page(chromium):
    """The page, just opened. It asks nobody for anything, and complains of nothing."""
    chromium.log("browser"), chromium.log("performance")
    chromium.call("/url", url=live.PAGE.as_uri())
    chromium.wait("tokens?.length === 15")
    yield chromium
    assert chromium.log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in chromium.log("performance")]
    sent = [x["params"] for x in sent if x["method"] == "Network.requestWillBeSent"]
    urls = {x["request"]["url"] for x in sent}
    inside = ("chrome", "data:")  # of Chromium's own first page
    assert {url for url in urls if not url.startswith(inside)} == {live.PAGE.as_uri()}
    assert chromium.run("return window.hit") is None


def write(page, text: str) -> None:
    code = "at('text').value = arguments[0]; at('text').dispatchEvent(new Event('input'))"
    page.run(code, text)


def next_ones(page) -> dict[str, float]:
    rows = page.run(
        "return [...at('next').children].map(x => [...x.children].map(y => y.innerText))"
    )
    return {token: float(p) for token, p, _ in rows}


@pytest.mark.parametrize("text", [TEXT, "", "a天|" + "xyz" * 30])
def test_attention_and_probabilities_are_those_of_torch(page, text):
    net, tokenizer = specimen.load()
    write(page, text)
    tokens = specimen.read(tokenizer, text)[:, : net.config.block_size]
    assert page.run("return tokens") == tokens[0].tolist()
    T = tokens.size(1)
    found = page.run("return result.weights")
    found = [[[row + [0] * (T - len(row)) for row in head] for head in layer] for layer in found]
    weights = specimen.attention(net, tokens)
    assert (torch.tensor(found) - weights).abs().max() < 0.005
    with torch.no_grad():
        logits = net(tokens)[0]
    for temperature in (1, 0.5):
        by = "return result.logits.map(z => probabilities(z, arguments[0]))"
        p = torch.tensor(page.run(by, temperature))
        assert (p - (logits / temperature).softmax(-1)).abs().max() < 0.005
    assert page.run("return [...at('tokens').children].length") == T
    said = page.run("return [...at('tokens').querySelectorAll('small')].map(x => x.innerText)")[1:]
    nats = specimen.surprise(net, tokens).tolist() if T > 1 else []
    assert [float(x) for x in said] == pytest.approx(nats, abs=0.03)


def test_a_token_a_head_and_a_temperature_are_chosen(page):
    net, tokenizer = specimen.load()
    weights = specimen.attention(net, specimen.read(tokenizer, TEXT))
    shades = "return [...at('tokens').children].map(x => Number(x.style.getPropertyValue('--w')))"
    assert page.run(shades) == pytest.approx(weights[1, 3, -1].tolist(), abs=0.005)
    page.run("at('heads').children[2].click()")  # the first layer's third
    page.run("at('tokens').children[11].click()")
    assert page.run(shades) == pytest.approx(weights[0, 2, 11].tolist(), abs=0.005)
    assert page.run("return document.querySelectorAll('.later').length") == 3
    assert next(iter(next_ones(page))) == "t"
    page.run("at('tokens').children[4].click()")  # before the bar nobody knows
    warm = next_ones(page)
    assert len(warm) == 10 and max(warm.values()) < 0.1
    move(page, "temperature", 0)
    assert [*next_ones(page).values()] == [1] + [0] * 9
    assert page.run("return at('now').innerText") == "0.00"
    assert next_ones(page).keys() == warm.keys()  # the order never changes


def test_its_words_are_those_of_the_browser(page, tmp_path, monkeypatch):
    words = "return [at('word').innerText, at('text').ariaLabel]"
    assert page.run(words) == ["temperature", "text"]
    monkeypatch.setattr(test_page, "QUIET", [*test_page.QUIET, "--accept-lang=zh-CN"])
    chinese = Browser(tmp_path)
    try:
        chinese.call("/url", url=live.PAGE.as_uri())
        assert chinese.run(words) == ["温度", "文本"]
    finally:
        chinese.end()


def test_a_click_writes_and_the_copy_comes_out(page):
    for _ in range(3):
        page.run("at('next').firstChild.click()")
    assert page.run("return at('text').value") == "nutshell|nutshell"
    assert next(iter(next_ones(page))) == "·"
    page.run("at('next').firstChild.click()")
    assert page.run("return [at('text').value, tokens]") == ["", [256]]


def test_markup_is_text_and_heads_are_drawn(page):
    write(page, HOSTILE)
    assert page.run("return document.querySelectorAll('img').length") == 0
    write(page, TEXT)
    pixels = """const pen = document.querySelector('canvas').getContext('2d');
        return [...pen.getImageData(4, 4, 57, 57).data]"""
    found = page.run(pixels)  # L0 H0 looks at the beginning, and no position at later ones
    hidden, seen = found[4 * 56 :][:4], found[4 * 57 * 56 :][:4]
    assert seen[2] > seen[0] + 50 and seen[3] > 200
    assert max(hidden[:3]) - min(hidden[:3]) < 20 and hidden[3] == 255
