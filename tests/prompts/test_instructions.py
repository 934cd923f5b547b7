"""What the teacher is told, and where in its prompt that stands."""

import copy

import pytest

from trl_crisp.prompts.instructions import (
    INSTRUCTIONS,
    build_teacher_prompt,
    looks_like_math,
    resolve_instruction,
    speaks_of_math,
)

# Typed from the paper, not taken from the package
PAPER_V1 = (
    "Solve the following math problem concisely and correctly. "
    "Be direct: avoid unnecessary elaboration, redundant steps, or restating the problem. "
    "Focus only on the key reasoning steps needed to reach the answer."
)
PAPER_V2 = (
    "Solve the following math problem concisely and correctly. "
    "Prioritize a correct final answer above brevity. "
    "For straightforward problems, be direct: avoid unnecessary elaboration, redundant steps, or restating the problem. "
    "For difficult or multi-step problems, do NOT over-compress: keep every reasoning step needed for correctness, "
    "including case analysis, edge cases, and a brief check of the final answer. "
    "Never omit a step that the answer depends on."
)
DAPO_FIRST_SENTENCE = "Solve the following math problem step by step."
DAPO_STUDENT = """\
Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer \
(without quotes) where $Answer is the answer to the problem.

What is 2 + 3?

Remember to put your answer on its own line after "Answer:"."""
DAPO_TEACHER_V1 = f"""\
{PAPER_V1}

The last line of your response should be of the form Answer: $Answer (without quotes) where $Answer is the answer to the \
problem.

What is 2 + 3?

Remember to put your answer on its own line after "Answer:"."""

C = "Be brief, please."


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


# Resolving


@pytest.mark.parametrize(("name", "text"), [("v1", PAPER_V1), ("v2", PAPER_V2)])
def test_v1_and_v2_are_the_papers_word_for_word(name, text):
    assert resolve_instruction(name) == text


def test_the_catalogue_has_these_names_and_no_text_twice():
    assert list(INSTRUCTIONS) == ["v1", "v2", "v3", "v4", "v5", "general"]
    assert len(set(INSTRUCTIONS.values())) == len(INSTRUCTIONS)
    assert all(resolve_instruction(name) == text for name, text in INSTRUCTIONS.items())
    assert "math" not in INSTRUCTIONS["general"]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_texts_are_clean(name):
    text = INSTRUCTIONS[name]
    assert text == " ".join(text.split()), "a line break or two spaces where strings were joined"
    assert text.endswith(".")
    assert text.isascii()


def test_explicit_targets_are_the_papers_words():
    assert resolve_instruction("percent:50") == (
        "Solve the following math problem correctly using 50% fewer tokens than you normally would. Be more concise -- cut "
        "unnecessary elaboration, redundant steps, and verbose explanations while preserving correctness."
    )
    assert resolve_instruction("words:200") == (
        "Solve the following math problem correctly in at most 200 words. Be concise -- state only the essential reasoning "
        "steps and skip any unnecessary elaboration."
    )
    assert "using 99% fewer" in resolve_instruction("percent:99")
    assert "at most 1 words" in resolve_instruction("words:1")


@pytest.mark.parametrize(
    "target",
    ["percent:0", "percent:100", "percent:", "percent:1.5", "percent:-5", "percent:50%", "words:0", "words:ten"],
)
def test_targets_out_of_range_are_refused(target):
    with pytest.raises(ValueError, match="whole number") as error:
        resolve_instruction(target)
    assert repr(target) in str(error.value)


@pytest.mark.parametrize("name", ["v6", "V2", "v2.", "concise", "percent", "words=20"])
def test_unknown_names_list_the_names(name):
    with pytest.raises(ValueError, match="is not a name in the catalogue") as error:
        resolve_instruction(name)
    message = str(error.value)
    assert repr(name) in message
    for known in ("v1", "v2", "v3", "v4", "v5", "general", "percent:N", "words:N", ".txt"):
        assert known in message


def test_a_text_is_itself_and_an_empty_one_is_none():
    assert resolve_instruction("  Be brief.\nReally brief. ") == "Be brief.\nReally brief."
    assert resolve_instruction("") == ""
    assert resolve_instruction(" \n") == ""
    assert resolve_instruction(" v1\n") == PAPER_V1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_read_without_its_outer_white_space(tmp_path, encoding):
    path = tmp_path / "my instruction.txt"
    path.write_text("\n  Sois bref : 3 étapes.\nAu plus.\n\n", encoding=encoding)
    assert resolve_instruction(str(path)) == "Sois bref : 3 étapes.\nAu plus."


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "brief.txt").write_text("brief", encoding="utf-8")
    assert resolve_instruction("~/brief.txt") == "brief"  # from a file, one word is enough


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file") as error:
        resolve_instruction(str(tmp_path / "none.txt"))
    assert str(tmp_path) in str(error.value)
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match="the file is empty"):
        resolve_instruction(str(tmp_path / "empty.txt"))


def test_a_text_of_several_lines_that_ends_in_a_file_name_is_a_text():
    assert resolve_instruction("Be brief.\nSee notes.txt") == "Be brief.\nSee notes.txt"


# Building


def test_a_dapo_row_gives_the_papers_teacher_text_exactly():
    teacher, replaced = build_teacher_prompt([user(DAPO_STUDENT)], resolve_instruction("v1"), DAPO_FIRST_SENTENCE)
    assert teacher == [user(DAPO_TEACHER_V1)]
    assert teacher[0]["content"].count("Remember to put your answer") == 1
    assert replaced is True


def test_a_dapo_row_as_a_string_gives_the_same_text():
    assert build_teacher_prompt(DAPO_STUDENT, PAPER_V1, DAPO_FIRST_SENTENCE) == (DAPO_TEACHER_V1, True)


def test_a_text_that_starts_otherwise_keeps_all_of_itself():
    text = "  What is 2 + 3? Solve the following math problem step by step.\n"
    assert build_teacher_prompt(text, C, DAPO_FIRST_SENTENCE) == (f"{C}\n\n{text}", False)


def test_without_replaces_nothing_is_taken_out():
    assert build_teacher_prompt(DAPO_STUDENT, C, None) == (f"{C}\n\n{DAPO_STUDENT}", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Think. What is 1?", f"{C}\n\nWhat is 1?"),
        ("\n Think.\n\nWhat is 1?\n", f"{C}\n\nWhat is 1?\n"),
        ("Think. Think. What is 1?", f"{C}\n\nThink. What is 1?"),
        ("Think.", C),
    ],
)
def test_replaces_is_taken_out_once_at_the_start(text, expected):
    assert build_teacher_prompt(text, C, "Think.") == (expected, True)


@pytest.mark.parametrize("role", ["user", "system"])
def test_no_instruction_leaves_the_prompt_as_it_is(role):
    prompt = [user(DAPO_STUDENT)]
    assert build_teacher_prompt(prompt, "", DAPO_FIRST_SENTENCE, role) == ([user(DAPO_STUDENT)], False)
    assert build_teacher_prompt(DAPO_STUDENT, "", DAPO_FIRST_SENTENCE, role) == (DAPO_STUDENT, False)


def test_the_instruction_goes_into_the_first_user_message():
    rest = [{"role": "assistant", "content": "Think. 3."}, user("Think. And 2 + 2?")]
    prompt = [system("Think. You add."), user("Think. 1 + 2?"), *rest]
    assert build_teacher_prompt(prompt, C, "Think.") == (
        [system("Think. You add."), user(f"{C}\n\n1 + 2?"), *rest],
        True,
    )


def test_a_tool_conversation_has_the_instruction_before_the_tool_turn():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    rest = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        user("So?"),
    ]
    assert build_teacher_prompt([user("1 + 2?"), *rest], C, None) == ([user(f"{C}\n\n1 + 2?"), *rest], False)


def test_the_instruction_goes_into_the_first_text_block():
    image = {"type": "image", "image": "pixels"}
    prompt = [user([image, {"type": "text", "text": "Think. What is it?"}, {"type": "text", "text": "Think. Well?"}])]
    teacher, replaced = build_teacher_prompt(prompt, C, "Think.")
    assert teacher == [
        user([image, {"type": "text", "text": f"{C}\n\nWhat is it?"}, {"type": "text", "text": "Think. Well?"}])
    ]
    assert replaced is True


def test_blocks_without_a_text_get_one():
    image = {"type": "image", "image": "pixels"}
    assert build_teacher_prompt([user([image])], C, None)[0] == [user([{"type": "text", "text": C}, image])]


def test_the_system_role_makes_a_system_message():
    teacher, replaced = build_teacher_prompt([user("Think. 1 + 2?")], C, "Think.", role="system")
    assert teacher == [system(C), user("1 + 2?")]
    assert replaced is True


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("You add.", f"You add.\n\n{C}"),
        ("", C),
        ([{"type": "text", "text": "You add."}], [{"type": "text", "text": "You add."}, {"type": "text", "text": C}]),
    ],
)
def test_the_system_role_appends_to_the_system_message(content, expected):
    teacher, replaced = build_teacher_prompt([system(content), user("1 + 2?")], C, "Think.", role="system")
    assert teacher == [system(expected), user("1 + 2?")]
    assert replaced is False


def test_the_system_role_with_content_blocks_takes_out_of_the_user_block():
    prompt = [user([{"type": "text", "text": "Think. 1 + 2?"}])]
    teacher, replaced = build_teacher_prompt(prompt, C, "Think.", role="system")
    assert teacher == [system(C), user([{"type": "text", "text": "1 + 2?"}])]
    assert replaced is True


def test_the_system_role_needs_messages():
    with pytest.raises(ValueError, match="instruction_role='user'"):
        build_teacher_prompt("1 + 2?", C, None, role="system")


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_prompt_without_a_user_message_is_refused(role):
    with pytest.raises(ValueError, match=r"no message of role 'user'.*\['system', 'assistant'\]"):
        build_teacher_prompt([system("You add."), {"role": "assistant", "content": "3"}], C, None, role)


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("instruction", [C, ""])
def test_the_students_prompt_is_not_modified(instruction, role):
    prompt = [
        system([{"type": "text", "text": "You add."}]),
        user([{"type": "text", "text": "Think. 1 + 2?"}]),
        {"role": "assistant", "content": "3"},
    ]
    before = copy.deepcopy(prompt)
    teacher, _ = build_teacher_prompt(prompt, instruction, "Think.", role)
    assert prompt == before
    for message in teacher:  # nor can it be through the teacher's
        message["content"] = None
    assert prompt == before


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("What is 2 + 2?", True),
        ([{"role": "user", "content": "Prove that the polynomial has no root."}], True),
        ("Find $x$ if \\(x > y\\).", True),
        ("Tell me about the capital city of France. Which city is it?", False),
        (
            [{"role": "system", "content": "Answer in 3 words."}, {"role": "user", "content": "Who wrote Hamlet?"}],
            False,
        ),
    ],
)
def test_a_math_problem_is_told_from_other_tasks(prompt, expected):
    assert looks_like_math(prompt) is expected


def test_the_papers_instructions_speak_of_math_and_the_general_one_does_not():
    assert [name for name, text in INSTRUCTIONS.items() if not speaks_of_math(text)] == ["general"]
