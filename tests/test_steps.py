"""The benchmarks of whole steps: same work, turns, ratios, and that the committed results are whole."""

import io
import json

import pytest
import torch

from benchmarks import memory, steps

TINY = steps.Case("cpu", steps.TINY, 2, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return steps.save_model(TINY, tmp_path_factory.mktemp("model"))


def trained(monkeypatch, capsys, name: str, case, model: str) -> list[dict]:
    """Three steps in this process, as a child takes them."""
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n" * 3))
    steps.train_in_turns(name, case, model, 3)
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix(steps.MARK)) for line in lines if line.startswith(steps.MARK)]


@pytest.mark.parametrize("lora_r", [0, 2], ids=["full", "lora"])
def test_sdft_computes_the_same_loss(monkeypatch, capsys, model, lora_r):
    case = TINY._replace(lora_r=lora_r)
    mine, theirs = (trained(monkeypatch, capsys, name, case, model) for name in ("crisp", "sdft"))
    assert len(mine) == len(theirs) == 3
    assert [one["loss"] for one in mine] == pytest.approx([one["loss"] for one in theirs], rel=1e-3)
    assert all(one["loss"] > 0 for one in mine)
    for one in (*mine, *theirs):
        assert all(one["seconds"][part] > 0 for part in steps.PARTS)
        # Only in a process of its own the peak is above what the imports took
        assert min(one["memory"]["peak_rss_mib"], one["memory"]["imports_mib"]) > 0


def test_a_separate_teacher_without_an_instruction_is_the_student_at_first(monkeypatch, capsys, model):
    found = trained(monkeypatch, capsys, "distillation", TINY, model)
    assert found[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_a_process_that_ends_is_an_error_with_its_words():
    with (
        steps.Contestant("crisp", TINY, "nowhere", "many") as one,
        pytest.raises(RuntimeError, match="crisp ended") as caught,
    ):
        one.step()
    assert "'many'" in str(caught.value)


def step_of(seconds: float, mib: float, loss: float = 1.0) -> dict:
    parts = {key: seconds for part in steps.PARTS for key in (part, f"{part}_cpu")}
    return {
        "loss": loss,
        "seconds": parts,
        "memory": {"imports_mib": 100.0, "peak_rss_mib": mib, "peak_gpu_mib": None},
    }


def test_quantiles_and_ratios_by_hand():
    """The first step is the warm-up; the peak is the largest."""
    table = steps.summarise(
        {
            "crisp": [step_of(99, 999), step_of(1, 300), step_of(2, 400), step_of(3, 200)],
            "sdft": [step_of(99, 999), step_of(4, 900), step_of(5, 700), step_of(6, 800)],
        }
    )
    assert table["crisp"]["training_half_s"] == pytest.approx({"p20": 4.2, "p50": 6, "p80": 7.8})
    assert table["sdft"]["backward_s"]["p50"] == 5
    assert (table["crisp"]["peak_mib"], table["sdft"]["peak_mib"]) == (400, 900)
    assert table["sdft"]["crisp_ratio"] == pytest.approx(
        {"training_half_s": 0.4, "training_half_cpu_s": 0.4, "peak_mib": 4 / 9, "peak_above_imports_mib": 3 / 8}
    )


class Fake:
    """A contestant whose steps are known."""

    turns: list[str] = []  # noqa: RUF012

    def __init__(self, name, case, model, count, env=None):
        self.name, self.env = name, env

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def step(self):
        self.turns.append(f"{self.name}, gives back" if self.env else self.name)
        return step_of(1, 1, loss=1.1 if self.name == "sdft" else 1.0)


def test_turns_begin_with_another_one_each_and_other_losses_are_an_error(monkeypatch):
    monkeypatch.setattr(steps, "Contestant", Fake)
    monkeypatch.setattr(Fake, "turns", [])
    found = steps.measure(TINY, 1, ("crisp", "distillation"))
    assert Fake.turns == ["crisp", "distillation", "distillation", "crisp"]
    assert {name: len(one) for name, one in found.items()} == {"crisp": 2, "distillation": 2}
    with pytest.raises(RuntimeError, match=r"its loss is 1\.1, ours 1\.0"):
        steps.measure(TINY, 1, ("crisp", "sdft"))
    monkeypatch.setattr(Fake, "step", lambda self: step_of(1, 1, loss=float("nan") if self.name == "sdft" else 1.0))
    with pytest.raises(RuntimeError, match="its loss is nan"):
        steps.measure(TINY, 1, ("crisp", "sdft"))


def test_a_peer_that_a_gpu_is_too_small_for_is_told_and_the_others_stay(monkeypatch):
    def step(self):
        if self.name == "sdft":
            raise steps.OutOfMemoryError("sdft ended")
        return step_of(1, 1)

    monkeypatch.setattr(steps, "Contestant", Fake)
    monkeypatch.setattr(Fake, "step", step)
    monkeypatch.setattr(steps, "save_model", lambda *_: "made on the GPU")
    found = steps.measure(TINY._replace(device="cuda"), 1)
    case = {"steps": found, "table": steps.summarise(found)}
    assert list(case["table"]) == ["crisp", "distillation"]
    assert steps.table_of({"big": case}).splitlines()[-1] == "| big | sdft | out of memory |" + " |" * 6


def test_a_process_that_ends_for_memory_is_told_from_others():
    with (
        steps.Contestant("crisp", TINY, "nowhere", "torch.OutOfMemoryError") as one,
        pytest.raises(steps.OutOfMemoryError, match="crisp ended"),
    ):
        one.step()


def test_memory_is_measured_alone_with_an_allocator_that_gives_back(monkeypatch):
    monkeypatch.setattr(steps, "Contestant", Fake)
    monkeypatch.setattr(Fake, "turns", [])
    found = steps.measure_memory(TINY, ("crisp", "sdft"))
    assert Fake.turns == [f"{name}, gives back" for name in ("crisp", "crisp", "sdft", "sdft")]
    timed = {name: [step_of(99, 9999)] * 3 for name in found}
    assert steps.summarise(timed, found)["crisp"]["peak_mib"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cases_for_a_gpu_are_skipped_with_a_word(monkeypatch, capsys, tmp_path):
    output = tmp_path / "steps.json"
    monkeypatch.setattr("sys.argv", ["steps", "--cases", "qwen3-8b-8192", "--output", str(output)])
    steps.main()
    assert "| qwen3-8b-8192 | skipped: no GPU |" in capsys.readouterr().out
    assert json.loads(output.read_text())["cases"]["qwen3-8b-8192"]["skipped"] == "no GPU"


def test_the_committed_steps_are_whole():
    record = json.loads(steps.RESULT.read_text(encoding="utf-8"))
    assert set(record["cases"]) == set(steps.CASES)
    for name, case in record["cases"].items():
        if "skipped" in case:
            assert steps.CASES[name].device == "cuda"
        else:
            assert case["table"] == steps.summarise(case["steps"], case["memory_steps"])
            assert not case["protocol"]["uncommitted_changes_in_package"]
            memory = [step["memory"] for steps_of_one in case["steps"].values() for step in steps_of_one]
            assert all(one["peak_rss_mib"] > one["imports_mib"] > 0 for one in memory)


def test_the_committed_growth_is_whole_and_drawn(tmp_path):
    record = json.loads(memory.RESULT.read_text(encoding="utf-8"))
    assert [(case["tokens"], case["vocabulary"]) for case in record["cases"]] == memory.sizes()
    assert all(case["table"] == steps.summarise(case["steps"]) for case in record["cases"])
    assert memory.RESULT.with_suffix(".png").is_file()
    pytest.importorskip("matplotlib")
    memory.draw(record, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
