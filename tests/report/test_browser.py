"""The page in headless Chromium: tests/run_browser.sh prepares and runs these tests."""

import itertools
import json
import os
import shutil

import pytest

from tests.report.made_results import training_log, write_evaluation, write_run
from trl_crisp.report.page import write_report

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: tests/run_browser.sh installs it")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PROBLEMS, SAMPLES = 500, 8
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></pre>"
# Background services would look for a network
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Contrast by WCAG 2: of each visible text with the nearest background that is not transparent
CONTRASTS = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const read = (c) => c.match(/[\\d.]+/g).map(Number);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility() || element.closest('script')) continue;
    let behind = element;
    while (behind && (read(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const style = getComputedStyle(element);
    const colours = [element.closest('svg') ? style.fill : style.color, behind ? getComputedStyle(behind).backgroundColor : 'rgb(255,255,255)'];
    const [a, b] = colours.map((c) => light(read(c)) + 0.05).sort((x, y) => y - x);
    if (a / b < 4.5) found.push([a / b, element.tagName, walker.currentNode.textContent.trim().slice(0, 40), ...colours]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page as large as the paper's: 500 problems with 8 samples, three models, a run, and answers that attack it."""
    root = tmp_path_factory.mktemp("report")

    def text(i, j):
        return f"{HOSTILE}\n" + f"Step {j}: let us check that {i} + {i} is right. " * 40 + f"\nAnswer: {2 * i}"

    def write(name, tokens, wrong_every, **changed):
        return write_evaluation(
            root / name,
            lambda i, j: (tokens + 7 * (i % 40) + j, (i + j) % wrong_every != 0),
            problems=PROBLEMS,
            samples=SAMPLES,
            text=text,
            **{"weights": name, **changed},
        )

    paths = [
        write("base", 400, 7),
        write("concise", 300, 5, weights="base", instruction="Be concise."),
        write("after", 200, 6),
    ]
    run = write_run(
        root / "run", training_log(), max_steps=40, best_global_step=10, best_model_checkpoint="checkpoint-10"
    )
    event = {"step": 15, "status": "watch", "reasons": ["more rollouts are clipped than at the start"]}
    (run / "health_events.jsonl").write_text(json.dumps(event) + "\n")
    output, _ = write_report(paths, root / "report.html", [run])
    return output


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: tests/run_browser.sh installs it")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def open_page(browser, report):
    """Return a function that opens the page; an error on the console or a request fails the test."""
    contexts, messages = [], []

    def open_it(fragment="", **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url) if request.url != page.url else None)
        page.goto(f"file://{report}{fragment}")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert [message for message in messages if not message.startswith((f"file://{report}", "blob:"))] == []


def test_the_page_is_small_and_opens_fast(open_page, report):
    assert report.stat().st_size < 5_000_000
    page = open_page()
    # The time of the page's own thread, because other programs on the machine delay it
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload(wait_until="load")
    assert page.locator("h1").is_visible()
    metrics = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
    assert 0 < metrics["TaskDuration"] < 2


def test_answers_do_not_run(open_page):
    page = open_page()
    assert page.evaluate("window.hacked") is None
    assert HOSTILE in page.locator(".trace:visible pre").last.inner_text()


def test_figures_are_drawn_within_their_cards(open_page):
    page = open_page()
    figures = page.locator("figure")
    assert figures.count() == 13
    for i in range(figures.count()):
        card, drawing = figures.nth(i).bounding_box(), figures.nth(i).locator("svg").bounding_box()
        assert drawing["width"] > 300
        assert drawing["height"] > 100
        assert drawing["x"] + drawing["width"] <= card["x"] + card["width"]


def shown(page):
    traces = page.locator(".trace:visible")
    assert traces.count() == 1
    return traces.get_attribute("id")


def test_arrow_keys_and_buttons_page_through_the_problems(open_page):
    page = open_page()
    assert shown(page) == "trace-0-0"
    assert page.locator("#position").inner_text() == "1 of 60"
    assert page.locator("#previous").is_disabled()
    page.keyboard.press("ArrowRight")
    page.locator("#next").click()
    assert shown(page) == "trace-0-2"
    assert page.url.endswith("#trace-0-2")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#position").inner_text() == "2 of 60"
    # Typing is not paging
    page.locator("#filter-text").focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == "trace-0-1"


def test_a_link_opens_its_problem(open_page):
    page = open_page("#trace-0-7")
    assert shown(page) == "trace-0-7"
    page.locator(".filter[data-kind='newly wrong']").click()
    others = page.locator("#rows tbody a:not([hidden])")
    target = page.locator(".trace:not([data-kinds*='newly wrong'])").first.get_attribute("id")
    assert others.count() == 60
    page.evaluate(f"location.hash = '{target}'")
    page.wait_for_function(f"!document.getElementById('{target}').hidden")
    assert shown(page) == target
    assert page.locator(".filter[data-kind='']").get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("kind", ["shortened", "newly wrong", "newly right", "hardest"])
def test_filters_apply_to_problems_and_rows(open_page, kind):
    page = open_page()
    button = page.locator(f".filter[data-kind='{kind}']")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    rows = page.locator("#rows tbody tr")
    visible = rows.evaluate_all("rows => rows.map((r) => [r.hidden, r.dataset.kinds.split('|')])")
    assert len(visible) == PROBLEMS
    assert all(hidden == (kind not in kinds) for hidden, kinds in visible)
    count = page.locator(".trace").evaluate_all(
        f"all => all.filter((t) => t.dataset.kinds.split('|').includes('{kind}')).length"
    )
    if count:
        assert page.locator("#position").inner_text() == f"1 of {count}"
        assert kind in page.locator(f"#{shown(page)}").get_attribute("data-kinds").split("|")


def test_search_finds_a_problem(open_page):
    page = open_page()
    page.locator("#filter-text").fill("PROBLEM/77 ")
    assert page.locator("#rows tbody tr:visible").count() == 1
    page.locator("#filter-text").fill("no such problem")
    assert page.locator(".trace:visible").count() == 0
    assert page.locator("#none-shown").is_visible()


def test_the_numbers_can_be_saved(open_page, tmp_path):
    page = open_page()
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "report.json")
    assert len(json.loads((tmp_path / "report.json").read_text())["results"][0]["problems"]["id"]) == PROBLEMS


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(open_page, scheme):
    assert open_page(color_scheme=scheme).evaluate(CONTRASTS) == []


def test_themes_differ(open_page):
    light, dark = (
        open_page(color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    )
    assert light != dark


def test_controls_have_names_and_headings_have_an_order(open_page):
    page = open_page()
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, select, a, summary')].filter((e) =>
        !(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length))).length""")
    assert nameless == 0
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map((h) => Number(h.tagName[1]))")
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    assert page.locator("th:not([scope])").count() == 0


def test_a_phone_does_not_scroll_sideways(open_page):
    page = open_page(viewport={"width": 375, "height": 812}, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.locator(".side").first.bounding_box()["width"] > 300


def test_a_print_has_no_controls(open_page):
    page = open_page()
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible()
    assert page.locator("h1").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRASTS) == []


def test_without_scripts_all_problems_are_there(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator(".trace:visible").count() == 60
