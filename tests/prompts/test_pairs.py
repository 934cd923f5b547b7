"""Both prompts of a row on real chat templates, and what is checked before the first step."""

import copy
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from tests.tiny_models import TEMPLATES, tiny_model, tiny_tokenizer
from trl_crisp import CRISPConfig, CRISPTrainer
from trl_crisp.prompts.pairs import PromptPairs, PromptReport, check_columns

C = "Be brief, please."
# The template, its flags, and the text that opens the model's turn, typed from the model's documentation
TURNS = [
    ("qwen3", {}, "<|im_start|>assistant\n"),
    ("qwen3", {"enable_thinking": True}, "<|im_start|>assistant\n"),
    ("qwen3", {"enable_thinking": False}, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("llama", {}, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("deepseek", {}, "<｜Assistant｜><think>\n"),  # noqa: RUF001
    ("gemma", {}, "<start_of_turn>model\n"),
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def tokenizing(kind: str, **template_kwargs):
    """Return a function from prompts to token ids with a family's chat template, and its tokenizer."""
    tokenizer = tiny_tokenizer(kind)

    def tokenize(prompts):
        if isinstance(prompts[0], str):
            return tokenizer(text=prompts)["input_ids"]
        return tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
        )["input_ids"]

    return tokenize, tokenizer


def pairs_of(kind="llama", instruction=C, replaces=None, role="user", max_prompt_tokens=None, **template_kwargs):
    return PromptPairs(instruction, replaces, role, tokenizing(kind, **template_kwargs)[0], max_prompt_tokens)


def by_letters(instruction="", max_prompt_tokens=None, tokenize=None) -> PromptPairs:
    """Return pairs of strings whose tokens are their letters."""
    letters = tokenize or (lambda prompts: [[ord(letter) for letter in prompt] for prompt in prompts])
    return PromptPairs(instruction, None, "user", letters, max_prompt_tokens)


# Real chat templates


@pytest.mark.parametrize(("kind", "flags", "turn"), TURNS)
def test_both_prompts_end_in_the_same_turn_and_differ_in_the_instruction_alone(kind, flags, turn):
    tokenize, tokenizer = tokenizing(kind, **flags)
    pairs = pairs_of(kind, **flags)
    row = {"prompt": [user("What is 2 + 3?")]}
    [student] = tokenize([row["prompt"]])
    [teacher] = pairs.select(Dataset.from_list([row]), 0)[0]["teacher_prompt_ids"]
    turn_ids = tokenizer(turn, add_special_tokens=False)["input_ids"]
    assert student[-len(turn_ids) :] == turn_ids
    assert teacher[-len(turn_ids) :] == turn_ids
    assert tokenizer.decode(teacher) == tokenizer.decode(student).replace("What", f"{C}\n\nWhat")
    kept, report = pairs.select(Dataset.from_list([row]), len(turn_ids))
    assert (len(kept), report.rows, report.dropped) == (1, 1, 0)


@pytest.mark.parametrize(("kind", "flags", "turn"), TURNS)
def test_the_trainer_finds_the_turn_that_both_prompts_end_in(tmp_path, kind, flags, turn):
    """Through the trainer's own tokenization; a count of 0 would turn the check of the tails off."""
    args = CRISPConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", instruction="v1", chat_template_kwargs=flags or None
    )
    prompt = [user("What is 2 + 3?")]
    trainer = CRISPTrainer(tiny_model(kind), args, Dataset.from_list([{"prompt": prompt}]), None, tiny_tokenizer(kind))
    turn_ids = tiny_tokenizer(kind)(turn, add_special_tokens=False)["input_ids"]
    assert trainer.turn_tokens == len(turn_ids)
    for ids in (
        trainer._tokenize_prompts([prompt])[0][0],
        trainer.train_dataset[0]["teacher_prompt_ids"],
    ):
        assert ids[-len(turn_ids) :] == turn_ids


@pytest.mark.parametrize("kind", sorted(set(TEMPLATES) - {"gemma"}))
def test_the_system_role_puts_the_instruction_before_the_question(kind):
    tokenize, tokenizer = tokenizing(kind)
    row = {"prompt": [user("What is 2 + 3?")]}
    pairs = pairs_of(kind, role="system")
    kept, _ = pairs.select(Dataset.from_list([row]), 2)
    [teacher] = pairs.select(Dataset.from_list([row]), 0)[0]["teacher_prompt_ids"]
    assert len(kept) == 1
    assert 0 < tokenizer.decode(teacher).index(C) < tokenizer.decode(teacher).index("What is 2 + 3?")
    assert tokenizer.decode(tokenize([row["prompt"]])[0]).count(C) == 0


def test_a_template_without_a_system_role_names_the_row_and_the_way_out():
    rows = Dataset.from_list([{"prompt": [user("One?")]}])
    with pytest.raises(ValueError, match=r"row 0: .*System role not supported.*instruction_role='user'"):
        pairs_of("gemma", role="system").select(rows, 3)


def test_the_row_whose_teacher_prompt_the_template_refuses_is_named():
    rows = [{"prompt": [user("One?")], "teacher_prompt": [user(f"{C} One?")]} for _ in range(3)]
    rows[2]["teacher_prompt"] = [user("a"), user("b")]  # gemma's template wants turns to alternate
    with pytest.raises(ValueError, match=r"row 2: .*alternate"):
        pairs_of("gemma").select(Dataset.from_list(rows), 3)


def test_a_students_prompt_that_the_template_refuses_is_named_by_its_row():
    """The instruction is not to blame, so the message must not say it."""
    prompts = [[user("One?")], [{"role": "system", "content": "Add."}, user("One?")]]
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    with pytest.raises(ValueError, match=r"row 1: column 'prompt': .*System role not supported") as raised:
        pairs_of("gemma", role="system", instruction="").select(rows, 3)
    assert "instruction_role" not in str(raised.value)


@pytest.mark.parametrize("number", [0, 1])
def test_blocks_for_a_template_that_takes_text_alone_are_named_by_their_row(number):
    tokenize, tokenizer = tokenizing("llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    prompts = [[user("Add 1.")], [user("Add 2.")]]
    prompts[number] = [{"role": "user", "content": [{"type": "text", "text": "Add."}]}]

    def lines():
        yield from ({"prompt": prompt} for prompt in prompts)

    rows = IterableDataset.from_generator(lines) if number else Dataset.from_list([{"prompt": p} for p in prompts[:1]])
    with pytest.raises(ValueError, match=rf"row {number}: column 'prompt': the chat template refuses"):
        list(PromptPairs("", None, "user", tokenize, None).select(rows, 0)[0])


@pytest.mark.parametrize("rows", [[{"prompt": "One?"}], DatasetDict(train=Dataset.from_list([{"prompt": "One?"}]))])
def test_what_is_no_dataset_is_refused_with_its_type(rows):
    with pytest.raises(ValueError, match=rf"the train dataset is a {type(rows).__name__}, .*from_list"):
        check_columns(rows)


# The length filter


@pytest.mark.parametrize(("kind", "flags", "turn"), TURNS)
def test_exactly_the_limit_is_kept_and_one_more_is_dropped(kind, flags, turn):
    """Measured on the teacher's side, which is the longer one here."""
    tokenize, tokenizer = tokenizing(kind, **flags)
    rows = [{"prompt": [user("x" * n)]} for n in (10, 11, 12, 1)]
    [limit] = {len(ids) for ids in tokenize([[user(f"{C}\n\n{'x' * 11}")]])}
    pairs = pairs_of(kind, max_prompt_tokens=limit, **flags)
    kept, report = pairs.select(Dataset.from_list(rows), len(tokenizer(turn, add_special_tokens=False)["input_ids"]))
    assert [row["prompt"][0]["content"] for row in kept] == ["x" * 10, "x" * 11, "x"]
    assert (report.rows, report.dropped, report.replaced, report.longest_tokens) == (4, 1, 0, limit + 1)


@pytest.mark.parametrize(
    ("student", "teacher", "fits"),
    [
        ("aaaa", "b", True),
        ("aaaaa", "b", False),
        ("a", "bbbb", True),
        ("a", "bbbbb", False),
        ("aaaaa", "bbbbb", False),
    ],
)
def test_either_side_can_be_the_longer(student, teacher, fits):
    rows = Dataset.from_list([{"prompt": student, "teacher_prompt": teacher}, {"prompt": "c", "teacher_prompt": "d"}])
    kept, report = by_letters(max_prompt_tokens=4).select(rows, 0)
    assert [row["prompt"] for row in kept] == ([student] if fits else []) + ["c"]
    assert report.dropped == (0 if fits else 1)
    assert report.longest_tokens == max(len(student), len(teacher))


def test_the_report_counts_each_row_once():
    report = PromptReport(rows=10, dropped=1, replaced=2, given=3, longest_tokens=70)
    assert report.describe(64) == (
        "9 of 10 rows kept; 1 dropped for a prompt of more than 64 tokens (the longest has 70). 3 of them have their own teacher "
        "prompt. In 2 of them the teacher's instruction replaces the student's own, in 5 it is added to the prompt."
    )


def test_no_limit_keeps_all():
    kept, report = by_letters().select(Dataset.from_list([{"prompt": "a" * 5000}]), 0)
    assert (len(kept), report.dropped, report.longest_tokens) == (1, 0, 5000)


def test_rows_beyond_one_batch_of_the_check_are_selected_too():
    rows = Dataset.from_list([{"prompt": "a" * (1 + i % 7)} for i in range(600)])
    kept, report = by_letters(max_prompt_tokens=5).select(rows, 0)
    assert kept["prompt"][:] == [row["prompt"] for row in rows if len(row["prompt"]) <= 5]
    assert (report.rows, report.dropped) == (600, sum(i % 7 > 4 for i in range(600)))


def test_rows_whose_own_instruction_is_replaced_are_counted():
    rows = Dataset.from_list([{"prompt": [user(text)]} for text in ("Think. One?", "Two?", " Think.\nThree?")])
    _, report = pairs_of(replaces="Think.").select(rows, 3)
    assert report.replaced == 2


def test_no_row_left_says_how_long_they_are():
    rows = Dataset.from_list([{"prompt": "a" * 30}, {"prompt": "a" * 40}])
    with pytest.raises(ValueError, match=r"the eval dataset has no row left: all 2 .*max_prompt_length=20.*has 40"):
        by_letters(max_prompt_tokens=20).select(rows, 0, "eval")


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="the train dataset is empty"):
        by_letters().select(Dataset.from_dict({"prompt": []}), 0)


def test_other_columns_stay_in_the_rows():
    rows = Dataset.from_list(
        [{"prompt": "aa", "answer": 1}, {"prompt": "a" * 9, "answer": 2}, {"prompt": "b", "answer": 3}]
    )
    kept, _ = by_letters(max_prompt_tokens=5).select(rows, 0)
    assert kept["answer"][:] == [1, 3]


# The column teacher_prompt


def test_the_column_wins_where_a_row_has_it():
    hint = [user("2 + 3 is 5. What is 2 + 3?")]
    rows = Dataset.from_list(
        [{"prompt": [user("What is 2 + 3?")], "teacher_prompt": given} for given in (hint, None, hint)]
    )
    pairs = pairs_of(replaces="What")
    prompts = [pairs.teacher_prompt(row) for row in rows]
    assert prompts == [(hint, False), ([user(f"{C}\n\nis 2 + 3?")], True), (hint, False)]
    kept, report = pairs.select(rows, 3)
    assert (report.rows, report.replaced) == (3, 1)
    assert kept["teacher_prompt"][:] == [prompt for prompt, _ in prompts]
    decoded = [tiny_tokenizer("llama").decode(ids) for ids in kept["teacher_prompt_ids"]]
    assert ["2 + 3 is 5." in text for text in decoded] == [True, False, True]
    assert [C in text for text in decoded] == [False, True, False]


def test_the_column_works_without_an_instruction():
    rows = Dataset.from_list([{"prompt": "a", "teacher_prompt": "b"}, {"prompt": "c", "teacher_prompt": None}])
    pairs = by_letters()
    assert [pairs.teacher_prompt(row)[0] for row in rows] == ["b", "c"]
    assert len(pairs.select(rows, 0)[0]) == 2


@pytest.mark.parametrize(
    ("prompt", "teacher_prompt"), [("One?", [user("Hint. One?")]), ([user("One?")], "Hint. One?")]
)
def test_mismatched_types_are_refused_by_row(prompt, teacher_prompt):
    rows = Dataset.from_list(
        [{"prompt": prompt, "teacher_prompt": None}, {"prompt": prompt, "teacher_prompt": teacher_prompt}]
    )
    with pytest.raises(ValueError, match=r"row 1: `teacher_prompt` is a (str|list) and `prompt` a (str|list)"):
        pairs_of().select(rows, 0)


# What would train something else


def test_an_equal_teacher_prompt_is_refused_by_row():
    rows = Dataset.from_list(
        [{"prompt": [user("One?")], "teacher_prompt": [user(text)]} for text in ("Hint. One?", "One?")]
    )
    with pytest.raises(ValueError, match="row 1: the teacher's prompt equals the student's"):
        pairs_of().select(rows, 3)
    with pytest.raises(ValueError, match="row 1: the teacher's prompt equals the student's"):
        pairs_of(instruction="").select(rows, 3)


def test_an_instruction_that_the_template_does_not_render_is_refused():
    """Qwen3's template renders content blocks as nothing."""
    blocks = [{"role": "user", "content": [{"type": "text", "text": "One?"}]}]
    with pytest.raises(ValueError, match="row 0: the teacher's prompt equals the student's"):
        pairs_of("qwen3").select(Dataset.from_list([{"prompt": blocks}]), 2)


def test_an_equal_prompt_beyond_the_first_batch_has_its_own_number():
    rows = [{"prompt": "a", "teacher_prompt": "b"} for _ in range(300)]
    rows[270]["teacher_prompt"] = "a"
    with pytest.raises(ValueError, match="row 270: "):
        by_letters().select(Dataset.from_list(rows), 0)


def test_without_instruction_and_column_equal_prompts_are_meant():
    kept, _ = pairs_of(instruction="").select(Dataset.from_list([{"prompt": [user("One?")]}]), 3)
    assert len(kept) == 1


def test_different_tails_are_refused_by_row():
    rows = Dataset.from_list([{"prompt": "a.", "teacher_prompt": "b."}, {"prompt": "a.", "teacher_prompt": "b!"}])
    with pytest.raises(ValueError, match=r"row 1: .*end in different tokens \(\[46\] and \[33\]\)"):
        by_letters().select(rows, 1)
    assert len(by_letters().select(rows, 0)[0]) == 2  # strings have no turn that a template opens


def test_a_tail_that_depends_on_the_prompt_is_refused():
    """As a chat template may do that opens <think> only for some conversations."""
    plain, _ = tokenizing("qwen3")
    unthinking, _ = tokenizing("qwen3", enable_thinking=False)

    def tokenize(prompts):
        return [(unthinking if C in prompt[0]["content"] else plain)([prompt])[0] for prompt in prompts]

    pairs = PromptPairs(C, None, "user", tokenize, None)
    with pytest.raises(ValueError, match=r"row 0: .*enable_thinking"):
        pairs.select(Dataset.from_list([{"prompt": [user("One?")]}]), 4)


def test_a_prompt_without_a_user_message_is_refused_by_row():
    rows = Dataset.from_list([{"prompt": [user("One?")]}, {"prompt": [{"role": "system", "content": "You add."}]}])
    with pytest.raises(ValueError, match="row 1: the prompt has no message of role 'user'"):
        pairs_of().select(rows, 3)


def test_strings_with_the_system_role_are_refused_by_row():
    with pytest.raises(ValueError, match="row 0: instruction_role='system' needs"):
        pairs_of(role="system").select(Dataset.from_list([{"prompt": "One?"}]), 0)


# Streams


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows)))


def test_a_stream_is_filtered_as_it_is_read():
    rows = [{"prompt": "a" * n} for n in (1, 9, 5, 6, 2)]
    kept, report = by_letters(max_prompt_tokens=5).select(stream(rows), 0)
    assert isinstance(kept, IterableDataset)
    assert report.rows == 0
    assert [len(row["prompt"]) for row in kept] == [1, 5, 2]
    assert (report.rows, report.dropped, report.longest_tokens) == (5, 2, 9)


def test_a_streams_bad_row_is_named():
    rows = [{"prompt": "a", "teacher_prompt": "b"} for _ in range(4)]
    rows[3]["teacher_prompt"] = "a"
    kept, _ = by_letters().select(stream(rows), 0)
    with pytest.raises(ValueError, match="row 3: the teacher's prompt equals"):
        list(kept)


def test_a_stream_of_messages_equals_a_dataset():
    rows = [{"prompt": [user("x" * n)]} for n in (3, 40, 5)]
    limit = len(tokenizing("llama")[0]([[user(f"{C}\n\n{'x' * 10}")]])[0])
    pairs = pairs_of(max_prompt_tokens=limit)
    assert list(pairs.select(stream(rows), 4)[0]) == list(pairs.select(Dataset.from_list(rows), 4)[0])


# Columns


def test_a_missing_prompt_column_and_images_are_refused():
    check_columns(Dataset.from_dict({"prompt": ["a"], "teacher_prompt": ["b"]}))
    with pytest.raises(ValueError, match="the eval dataset has no column 'prompt'; it has question, answer"):
        check_columns(Dataset.from_dict({"question": ["a"], "answer": ["b"]}), "eval")
    with pytest.raises(ValueError, match="it has none"):
        check_columns(Dataset.from_dict({}))
    for column in ("image", "images"):
        with pytest.raises(ValueError, match=f"column '{column}': vision inputs are not supported"):
            check_columns(Dataset.from_dict({"prompt": ["a"], column: ["b"]}))


def test_a_stream_of_unknown_columns_passes():
    unknown = stream([{"question": "a"}])
    assert unknown.column_names is None
    check_columns(unknown)


# Rows that cannot be asked


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, r"row 5: column 'prompt' holds an empty prompt"),
        ({"prompt": None}, r"row 5: column 'prompt' holds nothing \(null\)"),
        ({"prompt": "a", "teacher_prompt": "\n"}, r"row 5: column 'teacher_prompt' holds an empty prompt"),
        ({"prompt": "\u200b"}, r"row 5: the prompt in column 'prompt' has no tokens"),
        ({"prompt": "a", "teacher_prompt": "\u200b"}, r"row 5: the prompt in column 'teacher_prompt' has no tokens"),
    ],
)
def test_a_row_that_asks_for_nothing_is_named(row, message, stream):
    """For a stream as it is read; a tokenizer may leave nothing of a text that is not empty."""
    rows = Dataset.from_list([{"prompt": "aa", "teacher_prompt": "b"}] * 5 + [{"teacher_prompt": "b", **row}])
    letters = by_letters(tokenize=lambda prompts: [[ord(a) for a in prompt if a.isalpha()] for prompt in prompts])
    with pytest.raises(ValueError, match=message):
        list(letters.select(rows.to_iterable_dataset() if stream else rows, 0)[0])


@pytest.mark.parametrize("first", ["text", "messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_change_their_type_are_named(first, stream):
    kinds = {"text": "a", "messages": [user("a")]}
    one, other = kinds.pop(first), next(iter(kinds.values()))
    rows = Dataset.from_list([{"prompt": one}] * 5 + [{"prompt": other}], on_mixed_types="use_json")
    with pytest.raises(ValueError, match=r"row 5: column 'prompt' holds .*, and the rows before it"):
        list(pairs_of().select(rows.to_iterable_dataset() if stream else rows, 0)[0])


@pytest.mark.parametrize("prompt", ["", None, [], [{"content": "a"}], [{"role": "user", "content": None}]])
def test_the_first_row_is_named_by_the_trainer_too(tmp_path, prompt):
    rows = Dataset.from_list([{"prompt": prompt}, {"prompt": prompt}])
    args = CRISPConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="row 0: column 'prompt'"):
        CRISPTrainer(tiny_model(), args, rows, None, tiny_tokenizer())
