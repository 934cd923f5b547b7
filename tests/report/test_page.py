import html
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.made_results import training_log, write_evaluation, write_run
from trl_crisp.cli import main
from trl_crisp.evaluation.results import load_results
from trl_crisp.report import charts
from trl_crisp.report import page as page_module
from trl_crisp.report.embedding import clip, embed
from trl_crisp.report.page import write_report, write_run_page
from trl_crisp.report.rendering import markdown_cell, short
from trl_crisp.report.sources import load_compared

SMOLLM2 = Path(__file__).parents[2] / "benchmarks/results/smollm2"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 \u2029 \0 ]]> --> {{ 7*7 }} $x$"


class Page(HTMLParser):
    """Reads a page: its elements with their attributes, the text of each `script`, and all other text."""

    VOID = ("meta", "input", "br", "use")

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def of(self, tag, **attrs):
        return [found for name, found in self.elements if name == tag and attrs.items() <= found.items()]

    @property
    def data(self):
        [data] = [text for attrs, text in self.scripts if attrs.get("id") == "report-data"]
        return json.loads(data)


def right(i, j):
    return 100 + i, i != 3


def shorter(i, j):
    return 50 + i, i != 2


def write_both(directory, **changed):
    return [
        write_evaluation(directory / name, answer, weights=name, **changed)
        for name, answer in (("base", right), ("after", shorter))
    ]


def page_of(paths, output, runs=()):
    written = write_report(paths, output, runs)
    assert written == [output, output.with_suffix(".md")]
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    paths = [SMOLLM2 / f"seed3-{name}.json" for name in ("base", "concise", "after")]
    return page_of(paths, tmp_path_factory.mktemp("smollm2") / "report.html")


def test_the_numbers_in_the_page_are_those_of_the_results(smollm2):
    results = [load_results(SMOLLM2 / f"seed3-{name}.json") for name in ("base", "concise", "after")]
    shown = smollm2.data["results"]
    assert [one["role"] for one in shown] == ["base", "concise", "trained"]
    for one, expected in zip(shown, results, strict=True):
        assert one["summary"] == expected["summary"]
        assert one["protocol"] == expected["protocol"]
        assert one["problems"]["id"] == [problem["id"] for problem in expected["problems"]]
        assert one["problems"]["tokens"] == [[s["tokens"] for s in p["samples"]] for p in expected["problems"]]
        assert one["problems"]["correct"] == [
            [int(s["grades"]["128"]["correct"]) for s in p["samples"]] for p in expected["problems"]
        ]
    # Written by `trl-crisp eval --baseline`
    assert shown[2]["comparison"] == results[2]["comparison"]


def test_the_headline_says_what_the_results_say(smollm2):
    [verdict] = smollm2.data["verdicts"]
    assert verdict["level"] == "caution"
    assert (
        verdict["headline"] == "Use with caution: 74% fewer tokens [71%, 77%], accuracy kept: +3.7 points [-1.1, +9.0]"
    )
    assert verdict["reasons"] == [
        "Many answers were cut at the budget: 29% before, 1% after. Lengths and accuracy then speak of the cap; raise --max-new-tokens."
    ]
    for text in ("71.5%", "75.3%", "84.7", "21.8", "-74% [-77%, -71%]", "267 problems"):
        assert text in smollm2.text


def test_a_page_loads_nothing_and_runs_only_its_own_script(smollm2):
    assert not smollm2.of("link")
    assert not smollm2.of("iframe")
    assert all("src" not in attrs for _, attrs in smollm2.elements)
    addresses = [value for _, attrs in smollm2.elements for name, value in attrs.items() if name.endswith("href")]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    [policy] = [attrs["content"] for attrs in smollm2.of("meta", **{"http-equiv": "Content-Security-Policy"})]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert len(smollm2.scripts) == 2


def test_each_figure_has_a_text_alternative_and_ids_are_unique(smollm2):
    images = smollm2.of("div", role="img")
    titles = [image["aria-label"].split(".")[0] for image in images]
    assert titles == ["Accuracy against length", "Lengths of the answers", "Change by level", "Answer formats"]
    assert "CRISP 75.3% with 21.8 tokens" in images[0]["aria-label"]
    ids = [attrs["id"] for _, attrs in smollm2.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {attrs["href"][1:] for tag, attrs in smollm2.elements for tag in [tag] if "href" in attrs}
    used |= {attrs["xlink:href"][1:] for _, attrs in smollm2.elements if "xlink:href" in attrs}
    assert used <= set(ids)


def test_figures_follow_the_theme(smollm2):
    styles = " ".join(attrs.get("style") or "" for _, attrs in smollm2.elements)
    assert "var(--ink)" in styles
    assert not re.findall(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", styles)


def test_hostile_texts_are_inert(tmp_path):
    paths = write_both(
        tmp_path,
        text=lambda i, j: HOSTILE if i else "",
        prompt=lambda i: [{"role": "user", "content": HOSTILE}],
        names=lambda i: f"{HOSTILE}{i}",
        # JSON may hold half of a pair of surrogates
        level=lambda i: f"{HOSTILE}\ud800",
        protocol={"system": HOSTILE, "model": HOSTILE, "benchmark": HOSTILE},
    )
    run = write_run(tmp_path / "run", training_log())
    event = {"step": 5, "status": HOSTILE, "reasons": [HOSTILE]}
    (run / "health_events.jsonl").write_text(json.dumps(event) + "\n")
    page = page_of(paths, tmp_path / "report.html", [run])
    assert len(page.scripts) == 2
    assert not page.of("img")
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(2)&gt;" in raw
    # Escaped once
    assert "&amp;lt;" not in raw
    assert "{{ 7*7 }}" in page.text
    assert page.data["results"][0]["problems"]["id"][0] == HOSTILE + "0"
    assert page.data["results"][0]["problems"]["level"][0] == HOSTILE + "\ud800"
    assert page.data["runs"][0]["events"] == [event]
    assert "<img" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_response_of_a_million_characters_is_cut_in_the_middle(tmp_path):
    text = "<" * 1_000_000 + "Answer: 42"
    paths = write_both(tmp_path, problems=6, text=lambda i, j: text)
    page = page_of(paths, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert page.text.count("Answer: 42") == 2 * len(page.of("article"))
    assert "of 1,000,010 characters are left out; samples.jsonl has them" in page.text


def test_clip_keeps_the_start_and_the_end():
    assert clip("short", 10) == "short"
    assert re.fullmatch(r"a+\n\n\[… 900 of 1,000 .*\]\n\n[ab]+b", clip("a" * 980 + "b" * 20, 100))


@pytest.mark.parametrize(
    "text",
    ['"' * 9_000 + "a" * 300_000, "a" * 300_000 + '"' * 9_000, "解" * 50_000, "\ud800" * 50_000, "&" * 9, "é" * 10],
)
@pytest.mark.parametrize("most_bytes", [60, 20_000])
def test_a_clipped_text_takes_what_it_may(text, most_bytes):
    clipped = clip(text, most_bytes)
    size = len(html.escape(re.sub(r"\n\n\[… .* …\]\n\n", "", clipped)).encode("utf-8", "replace"))
    whole = len(html.escape(text).encode("utf-8", "replace"))
    # A character that does not fit, at both ends of the gap
    assert min(whole, most_bytes - 12) <= size <= most_bytes
    assert (clipped == text) == (whole <= most_bytes)


def write_large(root, **changed):
    size = {"problems": 500, "samples": 8, "budgets": (), "level": lambda i: None}
    return [
        write_evaluation(root / f"{n}", right if n == 0 else shorter, weights=f"{n}", **{**size, **changed})
        for n in range(3)
    ]


@pytest.mark.parametrize(
    ("changed", "log_steps", "runs"),
    [
        # Texts of which the shown part is larger than the rest of them
        ({"samples": 1, "problems": 70, "text": lambda i, j: '"' * 9_000 + "a" * 300_000}, 0, 0),
        # Long names that grow when they are escaped
        ({"samples": 1, "names": lambda i: f"{i}" + '"' * 290, "level": lambda i: "'" * 290}, 0, 0),
        ({"samples": 1, "problems": 60, "names": lambda i: f"{i}" + "解" * 20_000}, 0, 0),
        # Long logs
        ({"samples": 1, "problems": 3}, 4_000, 6),
    ],
)
def test_a_page_stays_below_5_mb(tmp_path, changed, log_steps, runs):
    paths = write_large(tmp_path, **changed)
    log = training_log(log_steps) if runs else []
    logs = [write_run(tmp_path / f"run{n}", log) for n in range(runs)]
    page = page_of(paths, tmp_path / "report.html", logs)
    assert 100_000 < (tmp_path / "report.html").stat().st_size < 5_000_000
    for run in page.data["runs"]:
        assert run["log_history"][-1]["step"] == log_steps
        assert [entry["step"] for entry in run["log_history"] if "eval_agreement" in entry] == [0, 10, 20]


def test_a_page_that_leaves_things_out_says_so(tmp_path, monkeypatch):
    small = {"samples": 1, "budgets": (), "level": lambda i: None}
    paths = write_both(tmp_path, text=lambda i, j: "text " * 100, **small)
    run = write_run(tmp_path / "run", training_log())
    whole = page_of(paths, tmp_path / "report.html", [run])
    size = (tmp_path / "report.html").stat().st_size
    assert "To keep this page below" not in whole.text
    monkeypatch.setattr(page_module, "MOST_BYTES", size - 1)
    half = page_of(paths, tmp_path / "report.html", [run])
    assert "it has 50% of the texts, rows and log entries that it would show." in half.text
    assert len(half.data["runs"][0]["log_history"]) == 13
    assert half.data["results"][0]["problems"] == whole.data["results"][0]["problems"]
    monkeypatch.setattr(page_module, "MOST_BYTES", 1)
    least = page_of(paths, tmp_path / "report.html", [run])
    assert (
        "it has 0% of the texts, rows and log entries that it would show, and no numbers of each problem" in least.text
    )
    assert "12 more rows are not in this table" in least.text
    assert least.data["results"][0]["problems"] is None
    assert least.data["verdicts"] == whole.data["verdicts"]


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn_without_warnings(tmp_path):
    levels = ["日本語", "العربية", "हिन्दी", "😀"]
    # The names of runs and of models are directories
    base, *after = (
        write_evaluation(tmp_path / name, answer, weights=name, level=lambda i: levels[i % 4])
        for name, answer in (("base", right), ("数学", shorter), ("ไทย", shorter))
    )
    runs = [write_run(tmp_path / f"{name}-run", training_log()) for name in ("数学", "ไทย")]
    page_of([base, *after], tmp_path / "report.html", runs)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for level in levels:
        assert f">{level} (3)</text>" in svg_of(text, "levels-0")
    for name in ("数学", "ไทย"):
        assert f">CRISP, {name}</text>" in svg_of(text, "accuracy-length")
        assert f">{name}-run</text>" in svg_of(text, "run-loss")


def test_problems_before_and_after(tmp_path):
    paths = write_both(tmp_path, text=lambda i, j: f"text {i}.{j}")
    page = page_of(paths, tmp_path / "report.html")
    articles = page.of("article")
    kinds = {attrs["data-find"].split()[0]: attrs["data-kinds"] for attrs in articles}
    assert kinds["problem/2"] == "newly wrong"
    assert kinds["problem/3"] == "newly right|hardest"
    assert kinds["problem/0"] == "shortened"
    assert len(articles) == 12
    for i in range(12):
        assert page.text.count(f"text {i}.0") == 2
        assert f"What is {i} + {i}?" in page.text
    rows = [attrs for attrs in page.of("tr") if "data-kinds" in attrs]
    assert [row["data-find"] for row in rows] == [f"problem/{i} level {i % 3}" for i in range(12)]


def test_at_most_60_problems_are_in_full_and_all_are_rows(tmp_path):
    paths = write_both(tmp_path, problems=200, text=lambda i, j: "text")
    page = page_of(paths, tmp_path / "report.html")
    assert len(page.of("article")) == 60
    assert sum("data-kinds" in attrs for attrs in page.of("tr")) == 200


def test_several_runs_are_compared_in_one_page(tmp_path):
    base, after = write_both(tmp_path, text=lambda i, j: "text")
    lost = write_evaluation(tmp_path / "lost", lambda i, j: (20, False), weights="lost", text=lambda i, j: "text")
    runs = [write_run(tmp_path / name, training_log(), max_steps=30) for name in ("run-a", "run-b")]
    page = page_of([base, after, lost], tmp_path / "report.html", runs)
    assert [(one["name"], one["level"]) for one in page.data["verdicts"]] == [
        ("CRISP, after", "caution"),
        ("CRISP, lost", "do not use"),
    ]
    assert "2 runs compared with the base" in page.text
    assert len(page.of("article")) == 24
    assert {attrs["data-run"] for attrs in page.of("article")} == {"CRISP, after", "CRISP, lost"}
    loss = next(image["aria-label"] for image in page.of("div", role="img") if image["aria-label"].startswith("Loss"))
    assert "run-a" in loss
    assert "run-b" in loss


RUN_NAMES = [f"qwen3-8b-crisp-math500-seed{i}" for i in range(10)]


@pytest.fixture(scope="module")
def ten_runs(tmp_path_factory):
    """A page of ten trained models and of their trainings, in directories that are named alike."""
    root = tmp_path_factory.mktemp("ten")
    size = {"problems": 210, "samples": 1, "budgets": (), "level": lambda i: None}
    base = write_evaluation(root / "base", right, **size)
    after = [write_evaluation(root / name / "eval", shorter, weights=name, **size) for name in RUN_NAMES]
    runs = [write_run(root / name / "out", training_log(60)) for name in RUN_NAMES]
    page = page_of([base, *after], root / "report.html", runs)
    return page, (root / "report.html").read_text(encoding="utf-8")


def svg_of(text, figure):
    start = text.index(f'id="figure-{figure}"')
    return text[start : text.index("</svg>", start)]


def test_ten_runs_can_be_told_apart(ten_runs):
    page, text = ten_runs
    assert [one["name"] for one in page.data["results"][1:]] == [f"CRISP, {name}" for name in RUN_NAMES]
    assert [one["name"] for one in page.data["runs"]] == RUN_NAMES
    assert sorted(re.findall(r"key key-trained-(\d+)", text)) == [str(i) for i in range(10)]
    for figure, start in (("accuracy-length", "CRISP"), ("lengths", "CRISP"), ("run-loss", "qwen3")):
        drawing = svg_of(text, figure)
        labels = re.findall(rf">({start}[^<]*seed\d)</text>", drawing)
        assert len(set(labels)) == len(labels) == 10
        assert max(map(len, labels)) <= 24
        assert set(re.findall(r"--run-\d", drawing)) == {f"--run-{i}" for i in range(10)}


def test_looks_of_ten_runs_differ(tmp_path):
    paths = [write_evaluation(tmp_path / f"{i}", shorter, problems=3, weights=f"{i}") for i in range(24)]
    compared = load_compared(paths)
    looks = [charts._look(compared, one) for one in compared.all]
    assert len({look["color"] for look in looks[:11]}) == len({look["marker"] for look in looks[:11]}) == 11
    # More have a colour or a marker of their own
    assert len({(look["color"], look["marker"]) for look in looks}) == 24


def test_colours_of_runs_are_in_the_style_sheet(ten_runs):
    style = ten_runs[1].split("<style>")[1].split("</style>")[0]
    for i in range(10):
        # Light, dark and print
        values = re.findall(rf"--run-{i}: (#\w+);", style)
        assert len(values) == 3
        assert values[0] == values[2] != values[1]
    assert len(set(re.findall(r"--run-\d: (#\w+);", style))) == 20


def test_each_of_ten_runs_has_rows(ten_runs):
    page, _ = ten_runs
    of_run = Counter(attrs["data-run"] for attrs in page.of("tr") if "data-kinds" in attrs)
    assert of_run == {f"CRISP, {name}": 200 for name in RUN_NAMES}
    assert "100 more rows are not in this table" in page.text


def test_reasons_are_told_whole_and_names_are_cut(tmp_path):
    reasons = [f"reason {i}: " + "a signal that has to be told to its end " * 4 for i in range(12)]
    run = write_run(tmp_path / "run", [{**entry, "health/status": 2.0} for entry in training_log()[:1]], global_step=1)
    event = {"step": 1, "status": "unhealthy", "reasons": [*reasons, "the last"]}
    (run / "health_events.jsonl").write_text(json.dumps(event) + "\n")
    page = page_of([], tmp_path / "report.html", [run])
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for reason in [*reasons, "the last"]:
        told = " ".join(reason.split())
        # In the verdict and in the table of events
        assert [" ".join(text.split()).count(told) for text in (page.text, markdown)] == [2, 2]
    assert short("n" * 400) == "n" * 299 + "…"


def test_runs_of_one_directory_name_are_named_by_what_differs_and_one_run_twice_is_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / name / "out", training_log()) for name in ("x1", "x2")]
    page = page_of([], tmp_path / "report.html", runs)
    assert [one["name"] for one in page.data["runs"]] == ["x1", "x2"]
    assert [one["name"] for one in page.data["verdicts"]] == ["x1", "x2"]
    (tmp_path / "link").symlink_to(runs[0])
    given = ["--run", str(runs[0]), "--run", str(tmp_path / "link")]
    assert main(["report", *given, "--output", str(tmp_path / "report.html")]) == 2
    assert f"--run {runs[0]} and --run {tmp_path / 'link'} are one run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "record", "level"),
    [
        ("checkpoint-10", None, "use"),
        ("checkpoint-20", None, "caution"),
        # The run took its best checkpoint back
        (".", {"run_id": "r", "step": 10}, "use"),
        (".", {"run_id": "r", "step": 20}, "caution"),
        (".", {"run_id": "other", "step": 10}, "caution"),
        (".", None, "caution"),
    ],
)
def test_the_signals_at_the_step_of_the_model_count(tmp_path, place, record, level):
    log = [{**entry, "health/status": 2.0 if entry["step"] > 10 else 0.0} for entry in training_log()]
    directory = write_run(tmp_path / "run", log)
    (directory / "_crisp_run.json").write_text(json.dumps({"run_id": "r"}))
    if record is not None:
        (directory / "crisp_training.json").write_text(json.dumps(record))
    base, after = (
        write_evaluation(
            tmp_path / name,
            lambda i, j, tokens=tokens: (tokens + i, i % 4 > 0),
            weights=name,
            problems=130,
            samples=1,
            protocol={"model": model},
        )
        for name, tokens, model in (("b", 800, "base"), ("a", 300, str(directory / place)))
    )
    (judged,) = page_module.judge_results(load_compared([base, after]), page_module._load_runs([directory]))
    assert judged.verdict.level == level


@pytest.mark.parametrize(
    ("given", "model", "cautious"),
    [
        ("real1", "{root}/real1", ["a1"]),
        ("link", "{root}/real1/checkpoint-10", ["a1"]),
        ("real1/checkpoint-20", "{root}/link", ["a1"]),
        # From a directory that is not today's
        ("real1", "real1", ["a1"]),
        ("link", "../runs/real1/checkpoint-10", ["a1"]),
        # Moved or merged: it may be of the run that no other result is of
        ("real1", "{root}/merged", ["a1"]),
        ("real1", "{root}/real2", []),
    ],
)
def test_an_unhealthy_run_is_held_against_its_model(tmp_path, monkeypatch, given, model, cautious):
    root = tmp_path / "runs"
    unhealthy = [{**entry, "health/status": 2.0} for entry in training_log() if "health/status" in entry]
    write_run(root / "real1", unhealthy)
    write_run(root / "real1" / "checkpoint-20", unhealthy)
    healthy = write_run(root / "real2", training_log())
    (root / "link").symlink_to(root / "real1")
    monkeypatch.chdir(tmp_path)
    base, *after = (
        write_evaluation(
            tmp_path / name,
            lambda i, j, tokens=tokens: (tokens + i, i % 4 > 0),
            weights=name,
            problems=130,
            samples=1,
            protocol={"model": place},
        )
        for name, tokens, place in (
            ("b", 800, "base"),
            ("a1", 300, model.format(root=root)),
            ("a2", 310, str(healthy)),
        )
    )
    compared = load_compared([base, *after])
    runs = page_module._load_runs([root / given, healthy])
    judged = page_module.judge_results(compared, runs)
    names = [one.name.removeprefix("CRISP, ") for one in judged if "signals" in " ".join(one.verdict.reasons)]
    assert names == cautious
    assert {one.verdict.level for one in judged} == ({"caution", "use"} if cautious else {"use"})


def test_levels_of_one_beginning_have_labels_of_their_own(tmp_path):
    paths = write_both(tmp_path, level=lambda i: f"a level with a very long name {i % 2}")
    page_of(paths, tmp_path / "report.html")
    drawing = svg_of((tmp_path / "report.html").read_text(encoding="utf-8"), "levels-0")
    assert len(set(re.findall(r">([^<]*\(6\))</text>", drawing))) == 2


def test_a_run_alone_is_shown(tmp_path):
    run = write_run(tmp_path / "run", training_log(), best_global_step=20, best_model_checkpoint="run/checkpoint-20")
    page = page_of([], tmp_path / "report.html", [run])
    titles = [image["aria-label"].split(".")[0] for image in page.of("div", role="img")]
    assert titles == [
        "Loss",
        "Reverse KL",
        "Length of the rollouts",
        "Entropies",
        "Rollouts that go wrong",
        "Measured during training",
        "Length of the measured answers",
    ]
    assert "60% fewer tokens, agreement with the base kept: -1.0 points" in page.text
    assert "run/checkpoint-20" not in page.text
    assert "The best checkpoint is checkpoint-20." in " ".join(page.text.split())
    assert page.data["runs"][0]["refreshes"] == [10]


def test_without_a_baseline_the_page_says_so(tmp_path):
    page = page_of(write_both(tmp_path)[:1], tmp_path / "report.html")
    assert "No verdict: there is no baseline to compare with" in page.text
    assert "Give the base's results first" in page.text


def test_one_problem_has_no_verdict(tmp_path):
    page = page_of(write_both(tmp_path, problems=1, text=lambda i, j: "text"), tmp_path / "report.html")
    assert "No verdict: a comparison of 1 problem(s) has no interval" in page.text
    assert len(page.of("article")) == 1


def test_a_group_beyond_those_drawn_is_judged_and_counted(tmp_path):
    # 57 subjects as in MMLU: the last one falls from 100% to 0%, and the first rises as much
    paths = [
        write_evaluation(
            tmp_path / name,
            lambda i, j, tokens=tokens, wrong=wrong: (tokens + i, i % 57 != wrong),
            weights=name,
            problems=57 * 4,
            samples=1,
            level=lambda i: f"s{i % 57:02d}",
        )
        for name, tokens, wrong in (("base", 600, 0), ("after", 200, 56))
    ]
    page = page_of(paths, tmp_path / "report.html")
    assert "Accuracy fell on level s56: -100.0 points [-100.0, -100.0]." in page.data["verdicts"][0]["reasons"]
    assert list(page.data["results"][1]["comparison_by_level"]) == [f"s{i:02d}" for i in range(57)]
    assert "41 smaller groups are not drawn." in page.text
    assert (tmp_path / "report.md").read_text().count("| level s") == 57


def test_a_group_of_empty_answers_has_no_reduction(tmp_path):
    def answer(tokens):
        return lambda i, j: (0 if i % 3 == 0 else tokens, i % 3 != 0 and i % 4 > 0)

    paths = [
        write_evaluation(tmp_path / name, answer(tokens), weights=name)
        for name, tokens in (("base", 500), ("after", 300))
    ]
    page = page_of(paths, tmp_path / "report.html")
    levels = page.data["results"][1]["comparison_by_level"]
    assert levels["level 0"]["reduction"] is None
    assert levels["level 0"]["changes"]["accuracy"]["estimate"] == 0
    assert levels["level 1"]["reduction"]["estimate"] == pytest.approx(0.4)
    # Those that the base never solves by one half of the samples
    assert page.data["results"][1]["comparison"]["1000"]["by_pass_rate"]["0% to 25%"]["problems"] > 4
    assert "level 0: tokens –, accuracy 0.0 points [0.0, 0.0]" in page.text  # noqa: RUF001
    assert "| level level 0 | 4 | – | 0.0 points [0.0, 0.0] |" in (tmp_path / "report.md").read_text()  # noqa: RUF001


def test_only_empty_answers_of_the_base_are_refused(tmp_path, capsys):
    empty = write_evaluation(tmp_path / "base", lambda i, j: (0, False))
    after = write_evaluation(tmp_path / "after", shorter, weights="after")
    assert main(["report", str(empty), str(after), "--output", str(tmp_path / "report.html")]) == 2
    assert "the answers in the baseline all have length 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problems", "samples", "size"),
    [
        (1, (1, 1), "1 problem × 1 sample,"),  # noqa: RUF001
        (12, (2, 2), "12 problems × 2 samples,"),  # noqa: RUF001
        (12, (1, 3), "12 problems × 1 (base), 3 (CRISP) samples,"),  # noqa: RUF001
    ],
)
def test_the_samples_per_problem_are_told_of_each_model_if_they_differ(tmp_path, problems, samples, size):
    paths = [
        write_evaluation(tmp_path / name, answer, weights=name, problems=problems, samples=count)
        for name, answer, count in (("base", right, samples[0]), ("after", shorter, samples[1]))
    ]
    assert size in page_of(paths, tmp_path / "report.html").text
    assert size in (tmp_path / "report.md").read_text()


def test_a_base_that_solves_nothing_gives_no_verdict(tmp_path):
    paths = [
        write_evaluation(tmp_path / name, lambda i, j, n=tokens: (n + i, False), weights=name, problems=100)
        for name, tokens in (("base", 600), ("after", 200))
    ]
    [verdict] = page_of(paths, tmp_path / "report.html").data["verdicts"]
    assert (verdict["level"], verdict["headline"]) == ("no verdict", "No verdict: the base solves next to nothing")


def test_unread_answers_are_told(tmp_path):
    base = write_evaluation(tmp_path / "base", lambda i, j: (100, False), status="unparseable")
    after = write_evaluation(tmp_path / "after", lambda i, j: (50, False), weights="after", status="unparseable")
    page = page_of([base, after], tmp_path / "report.html")
    assert "Most answers could not be read: 100% before, 100% after." in page.text


def test_answers_of_equal_length_and_no_level_are_drawn(tmp_path):
    paths = [
        write_evaluation(
            tmp_path / name, lambda i, j: (7, True), weights=name, level=lambda i: None, samples=1, budgets=()
        )
        for name in ("base", "after")
    ]
    page = page_of(paths, tmp_path / "report.html")
    assert "Use with caution: tokens 0% [0%, 0%], accuracy unclear: 0.0 points [0.0, 0.0]" in page.text


def test_the_page_of_a_training_has_what_it_measured(tmp_path):
    output = tmp_path / "run"
    for step, weights, answer in ((0, "base", right), (10, "ten", shorter), (20, "twenty", shorter)):
        write_evaluation(
            output / f"evaluation/sums/step-{step}",
            answer,
            weights=weights,
            text=lambda i, j: "text",
            protocol={"step": step},
        )
    measured = [
        {"step": step, "eval_sums_accuracy": 0.9, "eval_sums_mean_tokens": tokens}
        for step, tokens in ((0, 105.5), (10, 55.5), (20, 55.5))
    ]
    write_run(output, [*training_log(), *measured], best_global_step=10, best_model_checkpoint="run/checkpoint-10")
    assert write_run_page(output) == output / "report.html"
    page = Page((output / "report.html").read_text())
    assert [one["protocol"]["step"] for one in page.data["results"]] == [0, 10]
    assert "47% fewer tokens" in page.text
    (output / "evaluation/sums/step-0/results.json").unlink()
    write_run_page(output)
    assert Page((output / "report.html").read_text()).data["results"] == []


@pytest.mark.parametrize(
    ("name", "first", "is_drawn"),
    [
        ("sums", None, True),
        ("gsm8k", None, False),
        ("agreement", None, False),
        ("sums", {}, True),
        # Other problems, another set of the same name, or other settings
        ("sums", {"problems": 6}, False),
        ("sums", {"protocol": {"benchmark_revision": "sha256:1"}}, False),
        ("sums", {"protocol": {"temperature": 1.0}}, False),
    ],
)
def test_only_the_curve_of_the_same_benchmark_is_drawn_among_the_models(tmp_path, name, first, is_drawn):
    entries = [
        {"step": step, f"eval_{name}_accuracy": 0.9, f"eval_{name}_mean_tokens": 100.0 - step} for step in (0, 10, 20)
    ]
    run = write_run(tmp_path / "run", entries)
    if first is not None:
        write_evaluation(run / f"evaluation/{name}/step-0", right, **first)
    page_of(write_both(tmp_path), tmp_path / "report.html", [run])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("during training" in svg_of(text, "accuracy-length")) == is_drawn


def test_the_command_writes_the_page(tmp_path, capsys):
    base, after = map(str, write_both(tmp_path))
    run = str(write_run(tmp_path / "run", training_log()))
    output = tmp_path / "new" / "report.html"
    assert main(["report", base, after, "--run", run, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"Wrote {output} and {output.with_suffix('.md')}.\n"
    only = tmp_path / "only.md"
    assert main(["report", base, after, "--output", str(only)]) == 0
    assert only.read_text().startswith("# Use with caution: 47% fewer tokens [47%, 48%], accuracy unclear")
    assert not only.with_suffix(".html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "report.html"], "there is nothing to show"),
        (["results", "--output", "report.pdf"], "has to end in .html or .md"),
        (["missing", "--output", "report.html"], "there is no such file"),
    ],
)
def test_bad_arguments_are_refused_in_words(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_embedded_json_is_ascii_without_markup_and_without_nan():
    text = embed({"a": [float("nan"), "</script>\u2028&é", (float("inf"), 1.5)]})
    assert text == '{"a":[null,"\\u003c/script\\u003e\\u2028\\u0026\\u00e9",[null,1.5]]}'
    assert json.loads(text) == {"a": [None, "</script>\u2028&é", [None, 1.5]]}


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a | b\n`c`", "a \\| b \\`c\\`"),
        ("<b> & x", "&lt;b&gt; &amp; x"),
        ("[x](javascript:y) *z*", "[x]\\(javascript:y) \\*z\\*"),
        ("max_new_tokens _x_", "max_new_tokens \\_x\\_"),
    ],
)
def test_nothing_in_a_markdown_cell_is_markup(text, cell):
    assert markdown_cell(text) == cell
