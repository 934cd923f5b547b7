"""From a dataset's name to the rows that are trained on, and what is said where that fails."""

import json
import re
import sys
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trl_crisp.rows.arguments import CRISPScriptArguments
from trl_crisp.rows.hub import raise_for_hub
from trl_crisp.rows.loading import is_hub_id, load_splits, unreadable_rows_named
from trl_crisp.rows.prompts import deduplicate, load_prompts, split, to_prompts

DAPO_TEMPLATE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("datasets_cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write_rows(path, rows):
    """Write rows in the format of the path's extension."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        dataset = Dataset.from_list(rows)
        {".json": dataset.to_json, ".parquet": dataset.to_parquet, ".csv": dataset.to_csv}[path.suffix](str(path))
    return str(path)


def arguments(dataset_name, **overrides) -> CRISPScriptArguments:
    return CRISPScriptArguments(dataset_name=str(dataset_name), **overrides)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", [".jsonl", ".json", ".parquet", ".csv"])
def test_rows_of_local_files_become_prompts(tmp_path, extension, streaming):
    path = write_rows(tmp_path / f"rows{extension}", [{"problem": "1+1?", "n": 1}, {"problem": "{x}?", "n": 2}])
    args = arguments(
        path, prompt_template="Solve.\n\n{problem}", dataset_streaming=streaming, deduplicate_prompts=False
    )
    train, held_out = load_prompts(args)
    assert isinstance(train, IterableDataset if streaming else Dataset)
    assert [row["prompt"] for row in train] == [message("Solve.\n\n1+1?"), message("Solve.\n\n{x}?")]
    assert held_out is None


def test_a_template_reads_the_prompt_column_that_it_replaces(tmp_path):
    """A template may read the column that it replaces, with values of another type."""
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "1+1?", "problem": "1+1?"}, {"prompt": "2+2?", "problem": "2+2?"}]
    )
    train, _ = load_prompts(arguments(path, prompt_template="Q: {prompt}"))
    assert train["prompt"][1] == message("Q: 2+2?")
    train, _ = load_prompts(arguments(path, prompt_template=DAPO_TEMPLATE))
    text = train[0]["prompt"][0]["content"]
    assert text.startswith("Solve the following math problem step by step. The last line")
    assert text.endswith('\n\n1+1?\n\nRemember to put your answer on its own line after "Answer:".')


def test_template_reads_nested_columns_and_doubled_braces(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"info": {"problem": "1+1?"}}])
    train, _ = load_prompts(arguments(path, prompt_template="{info[problem]} In \\boxed{{}}."))
    assert train[0]["prompt"] == message("1+1? In \\boxed{}.")


def test_prompt_column_is_renamed_and_others_stay(tmp_path):
    rows = [{"prompt": "old", "chat": message("1+1?"), "teacher_prompt": message("Briefly: 1+1?")}]
    train, _ = load_prompts(arguments(write_rows(tmp_path / "rows.jsonl", rows), prompt_column="chat"))
    assert train[0] == {"prompt": message("1+1?"), "teacher_prompt": message("Briefly: 1+1?")}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_authors_prompt_set_is_read_by_its_own_columns(tmp_path, streaming):
    """Messages as JSON strings, the student's as `sft_prompt` and the teacher's as `sd_prompt` (their prepare_length_prune_data.py)."""
    rows = [
        {
            "question": question,
            "sd_prompt": json.dumps(message(f"Solve concisely. {question}")),
            "sft_prompt": json.dumps(message(f"Solve. {question}")),
            "teacher_solution": "",
            "ground_truth": "2",
        }
        for question in ("1+1?", "[0, 2] has how many?")
    ]
    path = write_rows(tmp_path / "self_distill_prompts.parquet", rows)
    args = arguments(
        path,
        prompt_column="sft_prompt",
        teacher_prompt_column="sd_prompt",
        dataset_streaming=streaming,
        deduplicate_prompts=not streaming,
    )
    train, _ = load_prompts(args)
    assert [row["prompt"] for row in train] == [message("Solve. 1+1?"), message("Solve. [0, 2] has how many?")]
    assert [row["teacher_prompt"] for row in train] == [
        message("Solve concisely. 1+1?"),
        message("Solve concisely. [0, 2] has how many?"),
    ]


def test_a_string_that_only_looks_like_json_stays_a_string(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "[1, 2] has how many?"}, {"prompt": '["a"]'}])
    train, _ = load_prompts(arguments(path))
    assert [row["prompt"] for row in train] == ["[1, 2] has how many?", '["a"]']


def test_a_row_that_breaks_the_form_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": json.dumps(message("1?"))}, {"prompt": "2?"}])
    with pytest.raises(Exception, match=r"column 'prompt' has messages as JSON in its first row, and in row 1 '2\?'"):
        load_prompts(arguments(path))


def test_a_teacher_prompt_needs_no_name_and_leaves_the_prompt_alone(tmp_path):
    rows = [{"prompt": json.dumps(message("1?")), "teacher_prompt": json.dumps(message("Briefly. 1?"))}]
    train, _ = load_prompts(arguments(write_rows(tmp_path / "rows.jsonl", rows)))
    assert train[0] == {"prompt": message("1?"), "teacher_prompt": message("Briefly. 1?")}
    path = write_rows(tmp_path / "one.jsonl", [{"p": "1?", "n": 1}])
    with pytest.raises(ValueError, match=r"prompt_column='p': .*no such column; it has teacher_prompt, n"):
        load_prompts(arguments(path, prompt_column="p", teacher_prompt_column="p"))
    with pytest.raises(ValueError, match=r"\{p\}, which is not a column; the columns are teacher_prompt, n"):
        load_prompts(arguments(path, prompt_template="{p}", teacher_prompt_column="p"))


def test_a_missing_teacher_prompt_column_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1?"}])
    with pytest.raises(ValueError, match=r"teacher_prompt_column='v1': .*no such column; it has prompt"):
        load_prompts(arguments(path, teacher_prompt_column="v1"))


def test_plain_strings_say_that_no_chat_template_applies(tmp_path, caplog):
    path = write_rows(tmp_path / "rows.jsonl", [{"problem": "1+1?"}])
    train, _ = load_prompts(arguments(path, prompt_column="problem"))
    assert train[0]["prompt"] == "1+1?"
    assert "prompt_template '{problem}'" in caplog.text


def test_deduplication_keeps_the_first_of_each_prompt():
    rows = [{"prompt": message(text), "id": i} for i, text in enumerate("abacb")]
    assert deduplicate(Dataset.from_list(rows))["id"][:] == [0, 1, 3]
    assert deduplicate(Dataset.from_list([{"prompt": p} for p in "aab"]))["prompt"][:] == ["a", "b"]


def test_split_is_a_partition_that_the_seed_fixes():
    dataset = Dataset.from_dict({"prompt": [str(i) for i in range(10)]})
    train, held_out = split(dataset, 0.8, 42)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted([*train["prompt"], *held_out["prompt"]]) == sorted(dataset["prompt"])
    assert split(dataset, 0.8, 42)[0]["prompt"][:] == train["prompt"][:]
    assert split(dataset, 0.8, 43)[0]["prompt"][:] != train["prompt"][:]


def test_duplicates_do_not_cross_the_split(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": message(str(i % 10))} for i in range(50)])
    train, held_out = load_prompts(arguments(path, dataset_train_fraction=0.8), evaluation=True)
    texts = [{row["prompt"][0]["content"] for row in part} for part in (train, held_out)]
    assert (len(train), len(held_out)) == (8, 2)
    assert not texts[0] & texts[1]
    assert load_prompts(arguments(path, dataset_train_fraction=0.8))[1] is None


def test_evaluation_rows_are_those_of_the_test_split(monkeypatch):
    splits = {name: Dataset.from_list([{"prompt": message(name)}]) for name in ("train", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.DatasetDict(splits))
    train, held_out = load_prompts(arguments("owner/name"), evaluation=True)
    assert train[0]["prompt"] == message("train")
    assert held_out[0]["prompt"] == message("test")


@pytest.mark.parametrize("streaming", [False, True])
def test_reasoning_gym_rows_follow_size_and_seed(streaming):
    args = arguments(
        "reasoning-gym:gsm_symbolic", dataset_size=4, dataset_streaming=streaming, deduplicate_prompts=False
    )
    rows = list(load_prompts(args)[0])
    assert [row["prompt"] for row in rows] == [message(row["question"]) for row in rows]
    assert len(rows) == 4
    assert list(load_splits(args)["train"]) == rows
    args.dataset_seed = 7
    assert list(load_prompts(args)[0]) != rows


def test_a_template_reads_the_columns_of_a_reasoning_gym_task():
    args = arguments("reasoning-gym:gsm_symbolic", dataset_size=1, prompt_template="{question} ({answer})")
    row = load_prompts(args)[0][0]
    assert row["prompt"] == message(f"{row['question']} ({row['answer']})")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BytedTsinghua-SIA/DAPO-Math-17k", True),
        ("gsm8k", True),
        ("owner/name-v1.5", True),
        ("reasoning-gym:gsm_symbolic", False),
        ("data/rows.jsonl", False),
        ("./rows", False),
        ("a/b/c", False),
        (None, False),
    ],
)
def test_hub_ids_are_told_from_paths(name, expected):
    assert is_hub_id(name) is expected


ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]


@pytest.mark.parametrize(
    ("file", "overrides", "error", "phrases"),
    [
        (None, {"dataset_name": None}, ValueError, ["no dataset", "dataset_name", "reasoning-gym:gsm_symbolic"]),
        (
            None,
            {"dataset_name": "data/rows.jsonl"},
            FileNotFoundError,
            ["'data/rows.jsonl'", "no such file", "OWNER/NAME"],
        ),
        (None, {"dataset_name": "rows.parquet"}, FileNotFoundError, ["no such file", "Check the path"]),
        (None, {"dataset_name": "~/a/b"}, FileNotFoundError, ["no such file"]),
        (None, {"dataset_name": "notes.txt"}, FileNotFoundError, ["no such file"]),
        (
            None,
            {"dataset_name": "owner/name"},
            ConnectionError,
            ["HF_HUB_OFFLINE", "Unset it", "local file", "hf download"],
        ),
        ("rows.txt", {}, ValueError, ["'.txt'", ".jsonl, .parquet, .csv"]),
        ("rows.jsonl", {"content": ""}, ValueError, ["empty file"]),
        ("rows.json", {"content": "[]"}, ValueError, ["no rows"]),
        ("rows.csv", {"content": "problem,answer\n"}, ValueError, ["no rows"]),
        ("rows.jsonl", {"content": '{"prompt": "a'}, ValueError, ["cannot be read as .jsonl", "Check the file"]),
        ("rows.jsonl", {}, ValueError, ["prompt_column='prompt'", "it has problem, answer", "prompt_template"]),
        (
            "rows.jsonl",
            {"prompt_column": "question"},
            ValueError,
            ["prompt_column='question'", "it has problem, answer"],
        ),
        (
            "rows.jsonl",
            {"prompt_template": "{question}?"},
            ValueError,
            ["{question}", "not a column", "problem, answer", "{{ or }}"],
        ),
        ("rows.jsonl", {"prompt_template": "{problem} in \\boxed{}"}, ValueError, ["not a column", "{{ or }}"]),
        ("rows.jsonl", {"prompt_template": "{problem} in {"}, ValueError, ["not a valid template", "{{ or }}"]),
        ("rows.jsonl", {"prompt_template": "1+1?"}, ValueError, ["no {column} placeholder", "problem, answer"]),
        (
            "rows.jsonl",
            {"content": '{"prompt": 3}\n'},
            ValueError,
            ["prompt_column='prompt' holds a int", "string or a list of messages"],
        ),
        ("rows.jsonl", {"content": '{"prompt": "a"}\n{"prompt": null}\n'}, ValueError, ["row 1:", "nothing (null)"]),
        (
            "rows.jsonl",
            {"content": '{"p": "a"}\n{"p": null}\n', "prompt_template": "{p}"},
            ValueError,
            ["row 1:", "column 'p' is null"],
        ),
        (
            "rows.jsonl",
            {"content": '{"prompt": "a"}\n' * 9, "dataset_train_fraction": 0.8},
            ValueError,
            ["dataset_train_fraction=0.8 of 1 rows (after de-duplication)", "leave dataset_train_fraction unset"],
        ),
        ("rows.jsonl", {"dataset_streaming": True}, ValueError, ["dataset_streaming", "deduplicate_prompts to false"]),
        (
            "rows.jsonl",
            {"prompt_column": "problem", "evaluation": True},
            ValueError,
            ["eval_strategy", "no split 'test' (it has train)", "dataset_train_fraction"],
        ),
        (
            None,
            {"dataset_name": "reasoning-gym:gsm_symbolc"},
            ValueError,
            ["no task 'gsm_symbolc'", "Close names: gsm_symbolic"],
        ),
        (None, {"dataset_name": "reasoning-gym:"}, ValueError, ["no task ''", "The tasks are", "gsm_symbolic"]),
    ],
)
def test_bad_data_arguments_say_what_to_do(tmp_path, file, overrides, error, phrases):
    overrides = dict(overrides)
    content = overrides.pop("content", "".join(json.dumps(row) + "\n" for row in ROWS))
    evaluation = overrides.pop("evaluation", False)
    if file:
        (tmp_path / file).write_text(content)
        overrides["dataset_name"] = str(tmp_path / file)
    with pytest.raises(error) as caught:
        load_prompts(CRISPScriptArguments(**overrides), evaluation=evaluation)
    assert all(phrase in str(caught.value) for phrase in phrases), str(caught.value)


def test_an_unknown_split_or_configuration_lists_those_that_exist(monkeypatch):
    only = Dataset.from_list([{"prompt": "a"}])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: datasets.DatasetDict(main=only, extra=only))
    with pytest.raises(ValueError, match=r"dataset_train_split='train'.*it has main, extra"):
        load_prompts(arguments("owner/name"))

    def no_configuration(*_, **__):
        raise ValueError("Config name is missing. Please pick one among the available configs: ['main']")

    monkeypatch.setattr("datasets.load_dataset", no_configuration)
    with pytest.raises(ValueError, match=r"dataset_config=None.*\['main'\].*Set dataset_config"):
        load_prompts(arguments("gsm8k"))


def test_a_missing_reasoning_gym_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        load_prompts(arguments("reasoning-gym:gsm_symbolic"))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 80])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"dataset_train_fraction={fraction}.*between 0 and 1"):
        CRISPScriptArguments(dataset_train_fraction=fraction)


def test_a_dataset_size_out_of_range_is_refused():
    with pytest.raises(ValueError, match="dataset_size=0"):
        CRISPScriptArguments(dataset_size=0)


def test_prompt_column_without_effect_warns():
    with pytest.warns(UserWarning, match="prompt_column='problem' has no effect"):
        CRISPScriptArguments(prompt_column="problem", prompt_template="{problem}")


def test_an_empty_dataset_in_memory_is_refused():
    with pytest.raises(ValueError, match="'owner/name' has no rows"):
        to_prompts(Dataset.from_dict({"prompt": []}), arguments("owner/name"))


def http_error(kind, text="401 Client Error"):
    return kind(text, response=SimpleNamespace(headers={}, request=None, status_code=401))


def raised(error, cause=None):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "offline", "kind", "expected", "phrases"),
    [
        (
            raised(OSError("You are trying to access a gated repo."), http_error(GatedRepoError)),
            False,
            "model",
            PermissionError,
            ["gated", "https://huggingface.co/o/n", "hf auth login", "local directory"],
        ),
        (
            # `datasets` drops the cause
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."),
            False,
            "dataset",
            PermissionError,
            ["https://huggingface.co/datasets/o/n", "hf auth login", "local file"],
        ),
        (
            raised(OSError("not a local folder"), http_error(RepositoryNotFoundError)),
            False,
            "model",
            FileNotFoundError,
            ["no such model", "Check the id", "hf auth login", "local directory"],
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."),
            False,
            "dataset",
            FileNotFoundError,
            ["no such dataset", "private", "hf auth login"],
        ),
        (http_error(RevisionNotFoundError), False, "model", FileNotFoundError, ["no such revision"]),
        (
            raised(OSError("We couldn't connect"), LocalEntryNotFoundError("not cached")),
            False,
            "model",
            ConnectionError,
            ["cannot be reached", "Connect to the network", "HTTPS_PROXY", "hf download o/n", "local directory"],
        ),
        (OfflineModeIsEnabled("offline"), True, "dataset", ConnectionError, ["HF_HUB_OFFLINE is set", "Unset it"]),
        (
            type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})("Name or service not known"),
            False,
            "dataset",
            ConnectionError,
            ["cannot be reached", "hf download --repo-type dataset o/n"],
        ),
        (http_error(HfHubHTTPError, "503 Server Error"), False, "model", HfHubHTTPError, ["503"]),
        (KeyError("elsewhere"), False, "model", KeyError, ["elsewhere"]),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch, error, offline, kind, expected, phrases):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(expected) as caught:
        raise_for_hub(error, kind, "o/n", "some_name")
    assert all(phrase in str(caught.value) for phrase in phrases), str(caught.value)


TEXTS = [{"prompt": f"Add {i}."} for i in range(5)]
CHATS = [{"prompt": message(f"Add {i}.")} for i in range(5)]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}


def prompts_of(args) -> list:
    """Return the prompts as training would read them."""
    return [row["prompt"] for row in load_prompts(args)[0]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "phrases"),
    [
        ([*TEXTS, {"prompt": ""}], ["prompt_column='prompt' holds an empty prompt"]),
        ([*TEXTS, {"prompt": " \n\t"}], ["prompt_column='prompt' holds an empty prompt"]),
        ([*TEXTS, {"prompt": None}], ["prompt_column='prompt' holds nothing (null)"]),
        ([*TEXTS, {"n": 1}], ["prompt_column='prompt' holds nothing (null)"]),
        ([*TEXTS, {"prompt": 3}], ["prompt_column='prompt' holds a int ('3')"]),
        ([*TEXTS, {"prompt": message("x")}], ["holds a list of messages", "rows before it a string"]),
        ([*TEXTS, {"prompt": json.dumps(message("x"))}], ["holds messages as JSON", "rows before it hold text"]),
        ([*CHATS, {"prompt": "x"}], ["holds a string ('x')", "rows before it a list of messages"]),
        ([*CHATS, {"prompt": None}], ["prompt_column='prompt' holds nothing (null)"]),
        ([*CHATS, {"prompt": []}], ["a list without messages"]),
        ([*CHATS, {"prompt": ["x"]}], ["a list with a str ('x')"]),
        ([*CHATS, {"prompt": [{"content": "x"}]}], ["message 0 has no 'role'; its keys are content"]),
        ([*CHATS, {"prompt": [{"role": None, "content": "x"}]}], ["message 0 has no 'role'"]),
        ([*CHATS, {"prompt": [{"role": "user"}]}], ["message 0, of role 'user', has no 'content'"]),
        ([*CHATS, {"prompt": [{"role": "user", "content": None}]}], ["message 0, of role 'user', has 'content' null"]),
        (
            [*CHATS, {"prompt": [*message("x"), {"role": "assistant", "content": None}, *message("y")]}],
            ["message 1, of role 'assistant', has 'content' null", "'tool_calls'"],
        ),
        ([*CHATS, {"prompt": [{"role": "user", "content": 3}]}], ["neither a string nor a list of blocks ('3')"]),
        ([*CHATS, {"prompt": message(" ")}], ["its last user message is empty"]),
        ([*CHATS, {"prompt": [*message("x"), *message("")]}], ["its last user message is empty"]),
        (
            [*CHATS, {"prompt": message([{"type": "text", "text": " "}])}],
            ["its last user message is empty"],
        ),
        (
            [{**row, "teacher_prompt": "x"} for row in TEXTS] + [{"prompt": "y", "teacher_prompt": " "}],
            ["teacher_prompt_column='teacher_prompt' holds an empty prompt"],
        ),
        (
            [{**row, "teacher_prompt": "x"} for row in TEXTS] + [{"prompt": "y", "teacher_prompt": message("x")}],
            ["teacher_prompt_column='teacher_prompt' holds a list of messages", "rows before it a string"],
        ),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, rows, phrases, streaming):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(f"dataset_name={path!r}, row 5: ")) as caught:
        prompts_of(arguments(path, dataset_streaming=streaming, deduplicate_prompts=not streaming))
    assert all(phrase in str(caught.value) for phrase in phrases), str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("extension", "content", "phrases"),
    [
        (".jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', ["row 1, column 'prompt'", "0xe9", "not UTF-8"]),
        (".jsonl", b'{"prompt": "a", "n": 1}\n\n{"prompt": "b", "n": "\xff"}', ["row 1, column 'n'", "0xff"]),
        (".json", b'[{"prompt": "a"}, {"prompt": "caf\xe9"}]', ["row 1, column 'prompt'", "0xe9", "not UTF-8"]),
        (".csv", b'prompt,n\n"a\nb",1\ncaf\xe9,2\n', ["row 1, column 'prompt'", "0xe9", "not UTF-8"]),
        (".jsonl", '{"prompt": "a"}\n'.encode("utf-16"), ["row 0", "0xff", "not UTF-8"]),
        (".jsonl", b'{"prompt": "a"}\n{"prompt": "b"', ["row 1 is torn or malformed"]),
        (".jsonl", b'{"prompt": "a"}\n{"prompt": "b\n{"prompt": "c"}\n', ["row 1 is torn or malformed"]),
        (".json", b'[{"prompt": "a"}, {"prompt": "b"', ["row 1 is torn or malformed"]),
        (".csv", b"prompt,n\na,1\nb,2,3\n", ["row 1 is torn or malformed: 3 cells under 2 columns"]),
        (".jsonl", b'{"prompt": "a"}\n3\n', ["row 1 is a number (3)", "an object with named columns"]),
        (".jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', ["row 1, column 'prompt'", "half a surrogate"]),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, extension, content, phrases, streaming):
    path = tmp_path / f"rows{extension}"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=re.escape(f"dataset_name={str(path)!r} cannot be read as {extension}")
    ) as caught:
        prompts_of(arguments(path, dataset_streaming=streaming, deduplicate_prompts=not streaming))
    assert all(phrase in str(caught.value) for phrase in phrases), str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "late"),
    [
        (lambda text: {"prompt": text}, {"prompt": message("y")}),
        (lambda text: {"prompt": message(text)}, {"prompt": "y"}),
        (lambda text: {"prompt": text, "n": 1}, {"prompt": "y", "n": {"a": 1}}),
    ],
)
def test_a_column_that_changes_its_type_late_is_named(tmp_path, row, late, streaming):
    """Beyond what the reader of `datasets` takes in at once, 10 MB, the types are those of the rows before."""
    rows = [row(f"{i} {'x' * 1_000_000}") for i in range(11)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, late])
    with pytest.raises(ValueError, match="row 11"), unreadable_rows_named(tmp_path / "rows.jsonl"):
        prompts_of(arguments(path, dataset_streaming=streaming, deduplicate_prompts=not streaming))


def test_an_assistants_tool_calls_need_no_content(tmp_path):
    rows = [
        *CHATS,
        {"prompt": [*message("x"), {**CALL, "content": None}, {"role": "tool", "name": "f", "content": ""}]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"prompt": [*message("x"), CALL, *message("y")]}])
    assert len(prompts_of(arguments(path))) == 7


def test_a_row_without_a_teacher_prompt_keeps_none_beside_rows_that_have_one(tmp_path):
    """It has the instruction, beside rows whose teacher's prompts are messages as JSON too."""
    given = [json.dumps(message("Briefly. 1?")), None]
    for some in (given, given[::-1]):
        rows = [{"prompt": message(f"{i}?"), "teacher_prompt": teacher} for i, teacher in enumerate(some)]
        train, _ = load_prompts(arguments(write_rows(tmp_path / "rows.jsonl", rows)))
        assert train["teacher_prompt"][:] == [teacher and json.loads(teacher) for teacher in some]


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({"p": "", "n": 1}, "all columns of its placeholders are empty"),
        ({"p": message("x"), "n": 1}, "the column 'p' holds messages"),
        ({"p": None, "n": 1}, "column 'p' is null"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_fills_no_template_is_named(tmp_path, row, phrase, streaming):
    path = write_rows(tmp_path / "rows.jsonl", [{"p": "a", "n": 1}, row])
    args = arguments(
        path, prompt_template="Solve: {p}", dataset_streaming=streaming, deduplicate_prompts=not streaming
    )
    with pytest.raises(ValueError, match=re.escape(f"dataset_name={path!r}, row 1: prompt_template: ")) as caught:
        prompts_of(args)
    assert phrase in str(caught.value)


def test_a_script_of_ones_own_loads_prompts_by_the_public_names(tmp_path):
    from trl_crisp import data

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Add 1."}\n')
    rows, held_out = data.load_prompts(data.CRISPScriptArguments(dataset_name=str(path)))
    assert (rows["prompt"][:], held_out) == (["Add 1."], None)
