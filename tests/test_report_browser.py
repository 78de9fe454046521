"""The report in a real browser: no errors, both themes, hostile text inert, keyboard, contrast, phone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser import Page, browser, needs_browser
from test_report import HOSTILE, evidence, model, report, rows, store  # noqa: F401

from selector.report import render

pytestmark = needs_browser

AXE = next(
    (
        path
        for folder in ("node_modules", os.environ.get("NODE_PATH", "node_modules"))
        if (path := Path(folder, "axe-core", "axe.min.js")).is_file()
    ),
    None,
)
"""The accessibility checker axe-core, where `npm install axe-core` has put it."""

CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const over = (top, bottom) => { const a = top[3] ?? 1; return [0, 1, 2].map(i => top[i] * a + bottom[i] * (1 - a)); };
  const light = rgb => rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => { const chain = []; for (let n = node; n; n = n.parentElement) chain.unshift(numbers(getComputedStyle(n).backgroundColor));
    return chain.reduce((under, color) => over(color, under), [255, 255, 255]); };
  const faults = [];
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()) || !node.getClientRects().length) continue;
    if (["SCRIPT", "STYLE", "OPTION"].includes(node.tagName)) continue;
    const style = getComputedStyle(node), back = behind(node);
    const [a, b] = [over(numbers(node instanceof SVGElement ? style.fill : style.color), back), back].map(light).sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faults.push(`${node.tagName}.${node.className}: ${node.textContent.slice(0, 30)} ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return faults;
})()"""


@pytest.fixture(scope="module")
def path(report, tmp_path_factory) -> Path:  # noqa: F811
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(report), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def open_all(page: Page) -> None:
    page.ask("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_renders_without_complaints_and_with_contrast(page, path, dark, tmp_path):
    page.complaints.clear()
    page.open(path, dark=dark)
    open_all(page)
    assert page.complaints == []
    assert page.ask(CONTRAST) == []
    paper = page.ask("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    page.screenshot(tmp_path / "page.png", whole=True)
    assert (tmp_path / "page.png").stat().st_size > 100_000
    page.ask("document.getElementById('theme').click()")
    assert (page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == dark
    assert page.ask(CONTRAST) == []


def test_hostile_text_is_inert_and_visible(page, path):
    page.open(path)
    open_all(page)
    assert page.ask("typeof window.hacked") == "undefined"
    assert page.ask("document.scripts.length") == 1
    assert (
        page.ask("document.querySelectorAll('img, iframe, object, embed, link, a[href^=\"javascript\"]').length") == 0
    )
    assert (
        page.ask(
            "[...document.querySelectorAll('*')].filter(n => [...n.attributes].some(a => a.name.startsWith('on'))).length"
        )
        == 0
    )
    shown = page.ask("document.body.innerText")
    for text in HOSTILE[:3]:
        assert f"{text} prompt" in shown


def test_policy_would_stop_a_script_that_came_through(page, path, tmp_path):
    """The second line of defence, tried on a page into which a script was put by hand."""
    broken = tmp_path / "broken.html"
    attack = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    broken.write_text(path.read_text(encoding="utf-8").replace("<main>", f"<main>{attack}"), encoding="utf-8")
    page.open(broken)
    assert page.ask("new Promise(done => setTimeout(() => done(typeof window.hacked), 100))") == "undefined"
    page.complaints.clear()


def test_everything_can_be_reached_and_read_with_the_keyboard(page, path):
    page.open(path)
    names = []
    for _ in range(40):
        page.press("Tab")
        names.append(
            page.ask("document.activeElement.tagName + '.' + (document.activeElement.getAttribute('class') || '')")
        )
        assert page.ask("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert names[0] == "BUTTON."
    assert "A." in names
    assert "SUMMARY." in names
    page.ask("document.querySelector('svg.heatmap').focus()")
    page.press("ArrowRight")
    page.press("ArrowDown")
    assert page.ask("document.querySelector('output').textContent").startswith("layer 1, k: ")
    page.ask("document.querySelectorAll('#layers summary')[1].focus()")
    page.press("Enter")
    assert page.ask("document.querySelectorAll('#layers details')[1].open") is True


def test_phone_needs_no_sideways_scrolling(page, path):
    page.open(path, width=360, height=740)
    open_all(page)
    assert page.ask("document.documentElement.scrollWidth") <= 360
    assert page.ask("parseFloat(getComputedStyle(document.body).fontSize)") >= 16


@pytest.mark.skipif(AXE is None, reason="no axe-core: `npm install axe-core` runs its accessibility rules as well")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(page, path, dark):
    assert AXE is not None
    page.open(path, dark=dark)
    open_all(page)
    page.ask(AXE.read_text(encoding="utf-8") + "; 0")
    found = page.ask(
        "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200), v.nodes[0].failureSummary]))"
    )
    assert found == []
