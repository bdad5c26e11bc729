"""The page of a report in a real browser: no error, no request, no overflow, and the numbers of the JSON.

Needs chromium and chromedriver: `apt-get install chromium chromium-driver`.
"""

import json
import shutil
from pathlib import Path

import pytest
from report_runs import sample_report
from sweep_runs import write_sweep

from sphere_plugin.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
COMMITTED = sorted(RESULTS.rglob("report.json"))
SCREENS = [(scheme, width) for scheme in ("light", "dark") for width in (390, 1440)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return sample_report(tmp_path_factory.getbasetemp() / "sample")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    browser.get("about:blank")  # leave the browser's own first page
    yield browser
    browser.quit()


@pytest.fixture
def show(driver, out):
    """show(scheme, width) opens the page, or another one, as such a screen has it."""
    waiting = pytest.importorskip("selenium.webdriver.support.wait")

    def opened(scheme="light", width=1440, page=out / "report.html"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for kind in ("browser", "performance"):
            driver.get_log(kind)
        driver.get(page.as_uri())
        there = "return document.readyState === 'complete' && location.href === arguments[0]"
        waiting.WebDriverWait(driver, 60).until(lambda _: driver.execute_script(there, page.as_uri()))
        return driver

    return opened


def requests(log):
    """The addresses asked for; the log is the whole browser's, whose own first page can still be loading."""
    messages = [json.loads(entry["message"])["message"] for entry in log]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome://")]


@pytest.mark.parametrize(("scheme", "width"), SCREENS)
def test_the_page_renders_without_error_request_or_overflow(show, scheme, width):
    page = show(scheme, width)
    assert page.execute_script("return document.querySelectorAll('svg.chart').length") > 20
    widths = "return [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
    assert max(page.execute_script(widths)[:2]) <= width
    assert page.execute_script(widths)[2] == width
    assert page.get_log("browser") == []
    asked = requests(page.get_log("performance"))
    assert asked, "the log of requests is empty; it would not show a forbidden one either"
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in asked if url.startswith("file://")]) == 1


def test_requests_of_a_page_are_seen_and_those_of_the_browsers_own_first_page_are_not_the_pages(show, tmp_path):
    there = tmp_path / "asks.html"
    there.write_text(
        '<img src="https://127.0.0.1:1/a.png"><script>fetch("https://127.0.0.1:1/b").catch(() => 0)</script>'
    )
    found = set(requests(show(page=there).get_log("performance")))
    assert {"https://127.0.0.1:1/a.png", "https://127.0.0.1:1/b"} <= found
    events = [("chrome://new-tab-page/", "chrome://resources/images/add.svg"), (there.as_uri(), "chrome://version")]
    log = [
        {
            "message": json.dumps(
                {
                    "message": {
                        "method": "Network.requestWillBeSent",
                        "params": {"documentURL": document, "request": {"url": url}},
                    }
                }
            )
        }
        for document, url in events
    ]
    assert requests(log) == ["chrome://version"]


def channels(colour):
    return [int(float(part)) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


def luminance(colour):
    linear = [c / 12.92 if (c := v / 255) <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for v in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_can_be_told_from_the_background(show, scheme):
    page = show(scheme)
    style = "const s = getComputedStyle(document.querySelector(arguments[0])); return s[arguments[1]]"
    behind = luminance(page.execute_script(style, "section > section, .study > section", "backgroundColor"))
    assert (behind < 0.1) == (scheme == "dark")
    wanted = [
        ("h3", "color"),
        (".caption", "color"),
        ("svg.chart text", "fill"),
        ("g.of path[style*='fill: none']", "stroke"),
    ]
    for selector, kind in wanted:
        ink = luminance(page.execute_script(style, selector, kind))
        contrast = (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05)
        assert contrast >= 4.5, f"{selector} {kind}"


def tables(page):
    """The comparison tables as they are read: a row of texts for each method."""
    read = """
        const text = (cell, part) => (cell.querySelector(part) || {textContent: ''}).textContent;
        const number = cell => text(cell, '.mean') + text(cell, '.half') || text(cell, 'i');
        const row = one => [text(one, 'span'), ...[...one.querySelectorAll('td[data-metric]')].map(number)];
        const tables = [...document.querySelectorAll('table.comparison')];
        return tables.map(table => [...table.tBodies[0].rows].map(row))"""
    return page.execute_script(read)


def stored_tables(path):
    """The same from a report.json."""
    studies = json.loads(path.read_text())["studies"]
    return [
        [[row["method"], *(value["shown"] for value in row["values"].values())] for row in study["table"]]
        for study in studies
    ]


def test_the_table_is_that_of_the_json(show, out):
    assert tables(show()) == stored_tables(out / "report.json")


@pytest.mark.parametrize("numbers", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS).parent))
@pytest.mark.parametrize("width", [390, 1440])
def test_the_committed_reports_open_and_show_the_numbers_of_their_json(show, numbers, width):
    page = show(width=width, page=numbers.with_name("report.html"))
    wanted = stored_tables(numbers)
    assert wanted and tables(page) == wanted
    assert page.get_log("browser") == []
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_method_can_be_hidden_and_shown(show):
    page = show()
    seen = """const study = document.querySelector('.study');
        return [...study.querySelectorAll('.m1:not(.chip)')].filter(e => e.getClientRects().length).length"""
    press = "document.querySelector('[data-hides=m1]').click()"
    before = page.execute_script(seen)
    assert before > 20
    page.execute_script(press)
    assert page.execute_script(seen) == 0
    assert page.execute_script("return document.querySelector('[data-hides=m1]').ariaPressed") == "false"
    page.execute_script(press)
    assert page.execute_script(seen) == before


def test_a_table_can_be_sorted(show):
    page = show()
    column = """const rows = document.querySelector('table.comparison').tBodies[0].rows;
        return [...rows].map(row => row.cells[1].dataset.value).map(Number)"""
    press = "document.querySelector('table.comparison thead th:nth-child(2) button').click()"
    page.execute_script(press)
    falling = page.execute_script(column)
    assert falling[1:] == sorted(falling[1:], reverse=True)
    page.execute_script(press)
    rising = page.execute_script(column)
    assert rising[1:] == sorted(rising[1:])
    assert rising[0] == falling[0], "the unedited model stays first"


def test_a_point_tells_its_value(show):
    page = show()
    shown = """const point = document.querySelector('#study1-curves use[data-tip]');
        point.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
        const tip = document.getElementById('tip'), box = tip.getBoundingClientRect();
        return [tip.textContent, tip.hidden, box.left >= 0 && box.right <= innerWidth]"""
    text, hidden, inside = page.execute_script(shown)
    assert text.startswith("MEMIT\n0 edits: ")
    assert not hidden
    assert inside


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_sweep(show, scheme, tmp_path):
    folder = write_sweep(tmp_path / "swept", {"eta": [0.3, 0.5], "alpha": [0.5, 0.8]}, ("memit",))
    page = show(scheme, 390, write_report([folder], tmp_path / "report"))
    assert page.execute_script("return document.querySelectorAll('svg.chart').length") == 5
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    assert page.get_log("browser") == []
    shown = """const cell = document.querySelector('#sweep1-memit use[data-tip]');
        cell.scrollIntoView({block: 'center'});
        const box = cell.getBoundingClientRect();
        const top = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
        top.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
        return [document.getElementById('tip').textContent, box.width]"""
    text, width = page.execute_script(shown)
    assert text.startswith("MEMIT + SPHERE, η 0.3, α 0.5\nEfficacy: ") and width > 10
    ink = "const s = getComputedStyle(document.querySelector(arguments[0])); return s[arguments[1]]"
    behind = luminance(page.execute_script(ink, ".study > section", "backgroundColor"))
    label = luminance(page.execute_script(ink, "#sweep1-memit svg.chart text", "fill"))
    assert (max(label, behind) + 0.05) / (min(label, behind) + 0.05) >= 4.5
