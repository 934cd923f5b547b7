"""The prompts of a preflight are those that training makes of the same rows."""

import json

import pytest
from datasets import Dataset

from tests.helpers import make_trainer
from tests.tiny_models import tiny_tokenizer
from trl_crisp.preflight.asking import draw_prompts, resolve_all
from trl_crisp.preflight.settings import PreflightSettings
from trl_crisp.prompts.instructions import DAPO_OPENING_SENTENCE, INSTRUCTIONS

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:instruction=")


def dataset(count: int = 12, opening: str = "", as_text: bool = False) -> Dataset:
    texts = [f"{opening}What is {'9' * (1 + i % 5)} + {i}?" for i in range(count)]
    return Dataset.from_list([{"prompt": text if as_text else [{"role": "user", "content": text}]} for text in texts])


def settings(**overrides) -> PreflightSettings:
    return PreflightSettings(**{"model": "m", "dataset": "d", "prompts": 8, "max_prompt_length": None, **overrides})


@pytest.mark.parametrize("kind", ["llama", "qwen3", "deepseek"])
@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (dataset(opening=f"{DAPO_OPENING_SENTENCE} "), {}),
        (dataset(), {"instruction_role": "system"}),
        (dataset(opening="Think. "), {"instruction_replaces": "Think."}),
        (dataset(opening=f"{DAPO_OPENING_SENTENCE} "), {"instruction_replaces": ""}),
        (dataset(as_text=True), {}),
    ],
)
def test_both_prompts_are_those_of_training(tmp_path, kind, rows, fields):
    asking = draw_prompts(rows, tiny_tokenizer(kind), settings(instructions=("v1", "be brief"), **fields))
    for number, instruction in enumerate(("v1", "be brief")):
        trainer = make_trainer(tmp_path, kind, dataset=rows, instruction=instruction, max_prompt_length=None, **fields)
        for one in asking.asked:
            row = trainer.train_dataset[one.row]
            [plain] = trainer._tokenize_prompts([row["prompt"]])[0]
            assert one.plain_ids == list(plain)
            assert one.told_ids[number] == row["teacher_prompt_ids"]
        assert asking.generation_prompt_tokens == trainer.turn_tokens


def test_flags_of_the_chat_template_reach_both_prompts():
    flags = {"enable_thinking": False}
    asking = draw_prompts(dataset(), tiny_tokenizer("qwen3"), settings(chat_template_kwargs=flags))
    plain = draw_prompts(dataset(), tiny_tokenizer("qwen3"), settings())
    tokenizer = tiny_tokenizer("qwen3")
    for one, other in zip(asking.asked, plain.asked, strict=True):
        for ids, without in zip([one.plain_ids, *one.told_ids], [other.plain_ids, *other.told_ids], strict=True):
            assert tokenizer.decode(ids) == tokenizer.decode(without) + "<think>\n\n</think>\n\n"


def test_prompts_are_drawn_at_random_once_each_and_fewer_are_the_first_of_more():
    rows = Dataset.from_list(list(dataset(20)) * 2)
    many = draw_prompts(rows, tiny_tokenizer(), settings(prompts=16))
    assert len({json.dumps(one.columns["prompt"]) for one in many.asked}) == 16
    assert [one.row for one in many.asked] != sorted(one.row for one in many.asked)
    few = draw_prompts(rows, tiny_tokenizer(), settings(prompts=8))
    assert few.asked == many.asked[:8]
    other = draw_prompts(rows, tiny_tokenizer(), settings(prompts=8, seed=7))
    assert [one.row for one in other.asked] != [one.row for one in few.asked]
    with pytest.raises(ValueError, match=r"prompts=21: the rows have only 20 different prompts\. Give fewer"):
        draw_prompts(rows, tiny_tokenizer(), settings(prompts=21))


def test_a_prompt_that_is_too_long_under_any_instruction_is_left_out():
    rows = Dataset.from_list([*dataset(10), {"prompt": [{"role": "user", "content": "7" * 160}]}])
    # The last row fits under the first instruction, and not under the second
    fields = {"instructions": ("be brief", "be brief " * 10), "max_prompt_length": 260}
    draw_prompts(rows, tiny_tokenizer(), settings(prompts=11, instructions=("be brief",), max_prompt_length=260))
    asking = draw_prompts(rows, tiny_tokenizer(), settings(prompts=10, **fields))
    assert {one.row for one in asking.asked} == set(range(10))
    with pytest.raises(
        ValueError, match=r"only 10 different prompts that are short enough \(1 are longer than max_prompt_length=260"
    ):
        draw_prompts(rows, tiny_tokenizer(), settings(prompts=11, **fields))
    with pytest.raises(ValueError, match=r"only 0 different prompts that are short enough.*larger max_prompt_length"):
        draw_prompts(rows, tiny_tokenizer(), settings(max_prompt_length=40))


def test_the_rows_own_teacher_prompts_replace_the_instructions():
    rows = dataset(8).map(
        lambda row: {"teacher_prompt": [{"role": "user", "content": "Short! " + row["prompt"][0]["content"]}]}
    )
    asking = draw_prompts(rows, tiny_tokenizer(), settings())
    assert [one.name for one in asking.told] == ["teacher_prompt"]
    assert asking.own_prompts == 8
    for one in asking.asked:
        [told] = one.told_ids
        assert "Short! What is" in tiny_tokenizer().decode(told)
    with pytest.raises(ValueError, match="v3 has no effect: each row has a teacher prompt of its own"):
        draw_prompts(rows, tiny_tokenizer(), settings(instructions=("v3",)))
    some = Dataset.from_list(
        [{**row, "teacher_prompt": row["teacher_prompt"] if i else None} for i, row in enumerate(rows)]
    )
    asking = draw_prompts(some, tiny_tokenizer(), settings())
    assert [one.name for one in asking.told] == ["v1", "v2"]
    assert asking.own_prompts == 7


def test_a_bad_row_is_named_by_its_number_in_the_dataset():
    bad = [
        {"prompt": [{"role": "assistant", "content": f"{i}"}]} if i == 5 else row for i, row in enumerate(dataset(12))
    ]
    with pytest.raises(ValueError, match=r"row 5: .*no message of role 'user'"):
        draw_prompts(Dataset.from_list(bad), tiny_tokenizer(), settings(prompts=12))


def test_names_texts_and_files_stand_for_what_they_are_in_training(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("Say little.\n")
    long = "Be as short as you can be. " * 4
    told = resolve_all(["v1", "percent:30", long, str(path), "", long + "Really."])
    assert [one.text for one in told][:2] == [INSTRUCTIONS["v1"], told[1].text]
    assert "30% fewer tokens" in told[1].text
    assert [one.text for one in told][2:] == [long.strip(), "Say little.", "", long + "Really."]
    names = [one.name for one in told]
    assert names[0] == "v1"
    assert names[2].endswith("...")
    assert len(names[2]) == 40
    assert len(set(names)) == 6


@pytest.mark.parametrize(
    ("instructions", "error", "words"),
    [
        (["v9"], ValueError, "'v9' is not a name in the catalogue. The names are v1"),
        (["percent:0"], ValueError, "a whole number from 1 to 99"),
        (["nowhere.txt"], FileNotFoundError, "there is no such file"),
        (["v1", "v1"], ValueError, "'v1' and 'v1' are the same text"),
        (["v1", INSTRUCTIONS["v1"]], ValueError, "and 'v1' are the same text"),
    ],
)
def test_wrong_instructions_are_named(instructions, error, words):
    with pytest.raises(error, match=words):
        resolve_all(instructions)


@pytest.mark.parametrize(("samples", "warns"), [(2, True), (3, True), (4, False)])
def test_few_answers_warn(recwarn, samples, warns):
    settings = PreflightSettings("m", "d", samples=samples)
    told = [one for one in recwarn if "the plain prompt's own agreement is wrong" in str(one.message)]
    assert (settings.samples, len(told)) == (samples, int(warns))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": 7}, "prompts=7: so few prompts say nothing about a model. Give at least 8"),
        ({"samples": 1}, "a majority needs at least 2 answers to a prompt"),
        ({"margin": 3.0}, "a number from 0 to below 1"),
        ({"margin": float("nan")}, "a number from 0 to below 1"),
        ({"instructions": ()}, "no instruction to measure"),
        ({"instruction_role": "tool"}, "Choose one of 'user', 'system'"),
        ({"grader": "essay"}, "'math', 'choice', 'text'"),
        ({"dtype": "float16"}, "'float32', 'bfloat16'"),
        ({"temperature": 0.0}, "gives the same answer each time"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"lora_r": 0}, "lora_r=0 must be at least 1"),
        ({"engine": "sglang"}, "engine='sglang' is unknown"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs has tokenize"),
    ],
)
def test_settings_out_of_range_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        settings(**fields)


def test_the_defaults_are_those_of_training():
    from trl_crisp.config import CRISPConfig
    from trl_crisp.data import CRISPScriptArguments

    ours = settings().__dataclass_fields__
    training = {**CRISPScriptArguments.__dataclass_fields__, **CRISPConfig.__dataclass_fields__}
    shared = ours.keys() & training.keys()
    assert {"temperature", "top_p", "top_k", "max_completion_length", "max_prompt_length", "seed"} <= shared
    # A run without max_steps has -1 there
    for name in shared - {"max_steps"}:
        assert ours[name].default == training[name].default, name
    assert ours["margin"].default == training["monitor_margin"].default
