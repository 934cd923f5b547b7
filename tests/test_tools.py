"""Tool turns through the real loop: a model that calls a tool, reads its result, and answers."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from tests.helpers import config
from tests.receiving_engine import engine_like, receiving
from tests.tiny_models import tiny_model, tiny_tokenizer
from trl_crisp import CRISPTrainer

C = "Be brief, please."
QUESTION, SMALL_TALK = "2+3?", "Hi!"
# As Qwen3 writes them; the second is what the template makes of the tool's result
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
RESULT = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
ANSWER, REPLY = "It is 5.<|im_end|>", "Hello.<|im_end|>"

calls: list[tuple[int, int]] = []


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: One.
        b: Two.
    """
    calls.append((a, b))
    return a + b


def prompt_of(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def prompt_ids_of(tokenizer, prompt) -> list[int]:
    return tokenizer.apply_chat_template(
        prompt, tools=[add], add_generation_prompt=True, tokenize=True, return_dict=False
    )


@pytest.fixture(scope="module")
def model_that_calls():
    """A model overfitted to call the tool for one prompt and to answer another at once."""
    tokenizer = tiny_tokenizer("qwen3")
    rows, labels = [], []
    for question, turns in ((QUESTION, [(CALL, 1), (RESULT, 0), (ANSWER, 1)]), (SMALL_TALK, [(REPLY, 1)])):
        rows.append(prompt_ids_of(tokenizer, prompt_of(question)))
        labels.append([-100] * len(rows[-1]))
        for text, learned in turns:
            ids = tokenizer(text)["input_ids"]
            rows[-1] += ids
            labels[-1] += ids if learned else [-100] * len(ids)
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    label_ids = torch.tensor([row + [-100] * (width - len(row)) for row in labels])

    model = tiny_model("qwen3", scale=1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(input_ids, labels=label_ids).loss  # padded on the right, so that no token sees the padding
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            return model.eval()
    raise AssertionError(f"the model did not learn to call the tool (loss {loss.item():.3f})")


class Recorded(CRISPTrainer):
    """Keeps the inputs and the loss of each micro-batch."""

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        result = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        self.seen = {"inputs": inputs, "loss": result[0], "num_tokens": result[2]}
        return result


def train_a_step(model, tmp_path, prompts, **overrides) -> Recorded:
    """Train one step, greedily sampled, so that the model writes what it has learned."""
    calls.clear()
    options = {"max_steps": 1, "top_k": 1, "max_completion_length": 200, "instruction": C, "learning_rate": 1e-4}
    options["per_device_train_batch_size"] = len(prompts)
    trainer = Recorded(
        model=copy.deepcopy(model),
        args=config(tmp_path, **{**options, **overrides}),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tiny_tokenizer("qwen3"),
        tools=[add],
    )
    trainer.train()
    return trainer


def rows_of(inputs) -> list[dict[str, list[int]]]:
    """Undo the padding; the row with the tool's turn first."""
    rows = []
    for i in range(len(inputs["completion_ids"])):
        completion = inputs["completion_mask"][i].bool()
        rows.append(
            {
                "prompt": inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist(),
                "teacher_prompt": inputs["teacher_prompt_ids"][i][inputs["teacher_prompt_mask"][i].bool()].tolist(),
                "completion": inputs["completion_ids"][i][completion].tolist(),
                "tool_mask": inputs["tool_mask"][i][completion].tolist(),
            }
        )
    return sorted(rows, key=lambda row: -len(row["completion"]))


@torch.no_grad()
def reverse_kl(model, row) -> list[float]:
    """The divergence at each token of the completion, one row at a time, float64, both models the same."""
    log_probs = []
    for prompt in ("prompt", "teacher_prompt"):
        ids = torch.tensor([row[prompt] + row["completion"]])
        logits = model(ids).logits[0, len(row[prompt]) - 1 : -1].double()
        log_probs.append(torch.log_softmax(logits, dim=-1))
    student, teacher = log_probs
    return (student.exp() * (student - teacher)).sum(-1).tolist()


@pytest.fixture(scope="module")
def trained(model_that_calls, tmp_path_factory):
    path = tmp_path_factory.mktemp("tools")
    trainer = train_a_step(model_that_calls, path, [prompt_of(QUESTION), prompt_of(SMALL_TALK)])
    return trainer, list(calls)


def test_the_tool_is_called_once_and_answered(trained):
    trainer, called = trained
    tokenizer = tiny_tokenizer("qwen3")
    assert called == [(2, 3)]
    completions = [tokenizer.decode(row["completion"]) for row in rows_of(trainer.seen["inputs"])]
    assert completions == [CALL + RESULT + ANSWER, REPLY]


def test_tool_tokens_are_masked_and_nothing_else_is(trained):
    trainer, _ = trained
    tokenizer = tiny_tokenizer("qwen3")
    with_tool, without = rows_of(trainer.seen["inputs"])
    lengths = [len(tokenizer(text)["input_ids"]) for text in (CALL, RESULT, ANSWER)]
    assert with_tool["tool_mask"] == [1] * lengths[0] + [0] * lengths[1] + [1] * lengths[2]
    assert set(without["tool_mask"]) == {1}
    assert trainer.seen["num_tokens"].item() == lengths[0] + lengths[2] + len(without["completion"])


def test_both_models_read_the_tools_turn_after_their_own_prompt(trained):
    trainer, _ = trained
    tokenizer, seen = tiny_tokenizer("qwen3"), {}
    student, teacher = trainer.model, trainer.teacher
    handles = []
    with teacher.serving() as teacher_model:
        for side, model in (("student", student), ("teacher", teacher_model)):
            handles.append(
                model.model.register_forward_pre_hook(
                    lambda _module, _args, kwargs, side=side: seen.update({side: kwargs["input_ids"].tolist()}),
                    with_kwargs=True,
                )
            )
    CRISPTrainer._compute_loss(trainer, student, trainer.seen["inputs"], torch.tensor(2.0))
    for handle in handles:
        handle.remove()
    for side, ids in seen.items():
        texts = [tokenizer.decode([i for i in row if i != tokenizer.pad_token_id]) for row in ids]
        [text] = [text for text in texts if RESULT in text]
        assert text.endswith(f"<|im_start|>assistant\n{CALL}{RESULT}{ANSWER}"), side
        assert text.count('"name": "add", "description"') == 1, f"{side} was not told of the tool"
    assert set(seen) == {"student", "teacher"}


def test_the_instruction_is_in_the_first_user_message_before_the_tools_turn(trained):
    trainer, _ = trained
    tokenizer = tiny_tokenizer("qwen3")
    for row, question in zip(rows_of(trainer.seen["inputs"]), (QUESTION, SMALL_TALK), strict=True):
        student = tokenizer.decode(row["prompt"])
        assert row["prompt"] == prompt_ids_of(tokenizer, prompt_of(question))
        turn = f"<|im_start|>user\n{question}<|im_end|>"
        assert student.count(turn) == 1
        instructed = f"<|im_start|>user\n{C}\n\n{question}<|im_end|>"
        assert tokenizer.decode(row["teacher_prompt"]) == student.replace(turn, instructed)
        assert C not in tokenizer.decode(row["completion"])


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_the_loss_is_the_oracles_over_the_models_own_tokens(model_that_calls, trained, tmp_path, normalization):
    trainer = trained[0]
    if normalization == "token":
        prompts = [prompt_of(QUESTION), prompt_of(SMALL_TALK)]
        trainer = train_a_step(model_that_calls, tmp_path, prompts, loss_normalization="token")
    inside, every = [], []
    for row in rows_of(trainer.seen["inputs"]):
        divergences = reverse_kl(model_that_calls, row)
        inside.append([d for d, mask in zip(divergences, row["tool_mask"], strict=True) if mask])
        every.append(divergences)

    def mean(rows):
        if normalization == "sequence":
            return sum(sum(row) / len(row) for row in rows) / len(rows)
        return sum(map(sum, rows)) / sum(map(len, rows))

    loss = trainer.seen["loss"].item()
    assert math.isfinite(loss)
    assert loss == pytest.approx(mean(inside), rel=1e-3, abs=1e-6)
    assert abs(mean(every) - mean(inside)) > 0.005 * mean(inside), "the tool's tokens would not show in this loss"
    logged = next(entry for entry in trainer.state.log_history if "reverse_kl" in entry)
    assert logged["reverse_kl"] == pytest.approx(sum(map(sum, inside)) / sum(map(len, inside)), rel=1e-3, abs=1e-6)


def test_nothing_flows_through_the_predictions_of_masked_tokens(trained):
    """The gradient of the loss to the last hidden states is zero where a tool's token is predicted, and only there."""
    trainer, _ = trained
    kept = []
    original = trainer._get_last_hidden_state

    def keep(model, *inputs):
        hidden = original(model, *inputs)
        if hidden.requires_grad:
            hidden.retain_grad()
            kept.append(hidden)
        return hidden

    trainer._get_last_hidden_state = keep
    try:
        loss, _, _ = CRISPTrainer._compute_loss(trainer, trainer.model, trainer.seen["inputs"], torch.tensor(2.0))
        loss.backward()
    finally:
        del trainer._get_last_hidden_state
        trainer.model.zero_grad()
    inputs = trainer.seen["inputs"]
    in_loss_BT = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    [hidden_BTH] = kept
    moved_BT = hidden_BTH.grad.abs().sum(-1) > 0
    assert torch.equal(moved_BT, in_loss_BT)


def test_tool_metrics_and_lengths_are_of_the_models_own_tokens(trained):
    trainer, _ = trained
    tokenizer = tiny_tokenizer("qwen3")
    logged = next(entry for entry in trainer.state.log_history if "tools/call_frequency" in entry)
    lengths = [sum(row["tool_mask"]) for row in rows_of(trainer.seen["inputs"])]
    assert logged["tools/call_frequency"] == 0.5
    assert logged["tools/failure_frequency"] == 0.0
    assert logged["completions/mean_length"] == sum(lengths) / 2
    assert logged["completions/mean_thinking_length"] == 0
    assert logged["completions/mean_answer_length"] == sum(lengths) / 2
    assert lengths[0] < len(tokenizer(CALL + RESULT + ANSWER)["input_ids"])


def test_a_step_learns_from_tool_turns(model_that_calls, tmp_path):
    trainer = train_a_step(model_that_calls, tmp_path, [prompt_of(QUESTION)] * 2)
    assert calls == [(2, 3)] * 2
    before = dict(model_that_calls.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    for name, parameter in trainer.teacher._model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    logged = trainer.state.log_history[0]
    assert math.isfinite(logged["loss"])
    assert logged["grad_norm"] > 0


def test_a_prompt_that_has_a_tools_turn_already_trains(model_that_calls, tmp_path):
    """As rows of an agent's later steps: arrow fills the fields that other messages have with None."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    prompt = [
        *prompt_of(QUESTION),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "5"},
    ]
    trainer = train_a_step(model_that_calls, tmp_path, [prompt, prompt], max_completion_length=4)
    for row in rows_of(trainer.seen["inputs"]):
        student, teacher = (tiny_tokenizer("qwen3").decode(row[key]) for key in ("prompt", "teacher_prompt"))
        assert "<tool_response>\n5\n</tool_response>" in student
        assert teacher == student.replace(f"user\n{QUESTION}", f"user\n{C}\n\n{QUESTION}")
        assert teacher.index(C) < teacher.index('{"name": "add", "arguments": {"a": 2, "b": 3}}')
    assert math.isfinite(trainer.seen["loss"].item())


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllms_tokens_before_the_tools_are_compared(model_that_calls, tmp_path, monkeypatch, mode):
    """The engine has no log-probabilities of what the tool wrote, and those after it are of another request."""
    engine = engine_like(model_that_calls)
    with receiving(engine, monkeypatch):
        prompts = [prompt_of(QUESTION), prompt_of(SMALL_TALK)]
        trainer = train_a_step(model_that_calls, tmp_path, prompts, use_vllm=True, vllm_mode=mode)
    assert calls == [(2, 3)]
    tokenizer = tiny_tokenizer("qwen3")
    has_value = [row.isfinite().sum().item() for row in trainer.seen["inputs"]["engine_log_probs"]]
    assert sorted(has_value) == sorted(len(tokenizer(text)["input_ids"]) for text in (CALL, REPLY))
    [gap] = [log["vllm/mean_gap_nats"] for log in trainer.state.log_history if "vllm/mean_gap_nats" in log]
    assert gap == pytest.approx(0.0, abs=1e-4)
