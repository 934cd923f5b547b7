"""CRISPTrainer end to end on tiny models: the loss, the loop, the inputs, the logs."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from tests.helpers import config, made_up_rollouts, make_trainer, parameters_of, rows
from tests.oracles import completion_logits, divergence_nats, entropy_nats, mean_loss, topk_overlap
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer
from trl_crisp import CRISPTrainer
from trl_crisp.loss import kernel, kernel_torch

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is", "ignore:teacher_sync_steps=", "ignore:The teacher follows the student"
)

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def shifted_teacher(trainer) -> None:
    """Give the teacher other weights than the student's, as after some steps."""
    torch.manual_seed(7)
    with torch.no_grad():
        for _, _, weights in trainer.teacher._weight_pairs():
            weights.add_(torch.randn_like(weights) * 0.05)


def oracle_loss(student, teacher, plain, beta, normalization, temperature=1.0):
    """Loss of made-up rollouts: no padding, no batching, float64 loops over the vocabulary."""
    divergences = []
    for i, completion in enumerate(plain["completions"]):
        q = completion_logits(student, plain["students"][i], completion)
        with torch.no_grad():
            p = completion_logits(teacher, plain["teachers"][i], completion)
        divergences.append(
            [divergence_nats(list(q[t]), p[t].tolist(), beta, temperature) for t in range(len(completion))]
        )
    return mean_loss(divergences, plain["masks"], normalization)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("kind", "tuning"), [("llama", "full"), ("gemma", "full"), ("qwen3", "lora")])
def test_loss_and_gradients_equal_the_oracle(tmp_path, kind, tuning, beta, normalization):
    """Ragged rollouts with tool tokens and one that is masked whole, over two micro-batches."""
    model = tiny_model(kind)
    trainer = make_trainer(
        tmp_path,
        kind,
        model=get_peft_model(model, LoraConfig(**LORA)) if tuning == "lora" else model,
        beta=beta,
        loss_normalization=normalization,
        loss_temperature=1.3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    if tuning == "lora":
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if ".default" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    shifted_teacher(trainer)
    model = trainer.model.train()
    batch, plain = made_up_rollouts(model.config.vocab_size, [4, 2, 3, 2], masked={0: [1], 3: [0, 1]})
    num_items = torch.tensor(3 if normalization == "sequence" else 8)

    loss = 0.0
    for half in (slice(0, 2), slice(2, 4)):
        inputs = {key: value[half] for key, value in batch.items()} | {"num_items_in_batch": num_items}
        part = trainer.compute_loss(model, inputs)
        part.backward()
        loss += part.item()

    with trainer.teacher.serving() as served:
        teacher = copy.deepcopy(served).double().eval()
    student = copy.deepcopy(model).double().eval()
    student.zero_grad()
    expected = oracle_loss(student, teacher, plain, beta, normalization, 1.3)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    expected_gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), expected_gradients[name], rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("sampled_tokens", [32, 2])
def test_logged_values_equal_the_oracle(tmp_path, monkeypatch, beta, sampled_tokens):
    """
    reverse_kl, entropy, teacher_entropy and topk_overlap of made-up rollouts, at the loss's temperature.

    The overlap is of a sample of the tokens, here the first and the last; the others are of all tokens.
    """
    monkeypatch.setattr("trl_crisp.loss.divergence.OVERLAP_TOKENS", sampled_tokens)
    trainer = make_trainer(tmp_path, beta=beta, loss_temperature=1.7)
    shifted_teacher(trainer)
    batch, plain = made_up_rollouts(trainer.model.config.vocab_size, [3, 2])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch | {"num_items_in_batch": torch.tensor(2)})
    kls, entropies, teacher_entropies, overlaps = [], [], [], []
    with torch.no_grad(), trainer.teacher.serving() as teacher:
        for i, completion in enumerate(plain["completions"]):
            q = completion_logits(trainer.model, plain["students"][i], completion).tolist()
            p = completion_logits(teacher, plain["teachers"][i], completion).tolist()
            kls += [divergence_nats(q_t, p_t, 1.0, 1.7) for q_t, p_t in zip(q, p, strict=True)]
            entropies += [entropy_nats(q_t, 1.7) for q_t in q]
            teacher_entropies += [entropy_nats(p_t, 1.7) for p_t in p]
            overlaps += [topk_overlap(q_t, p_t, 16, 1.7) for q_t, p_t in zip(q, p, strict=True)]
    seen = slice(None) if sampled_tokens > 5 else slice(None, None, 4)
    metrics = trainer._metrics["train"]
    for name, values in (
        ("reverse_kl", kls),
        ("entropy", entropies),
        ("teacher_entropy", teacher_entropies),
        ("topk_overlap", overlaps[seen]),
    ):
        assert metrics[name] == [pytest.approx(sum(values) / len(values), rel=1e-4)], name


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["periodic", "live", "base", "ema"])
def test_no_instruction_and_same_weights_give_zero_loss_and_zero_gradient(tmp_path, tuning, kind):
    """An identity of the method, through the whole loop."""
    trainer = make_trainer(
        tmp_path,
        instruction="",
        teacher_model_kind=kind,
        max_steps=1,
        peft_config=LoraConfig(**LORA) if tuning == "lora" else None,
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == 0
    assert first["grad_norm"] == 0
    assert first["reverse_kl"] == 0


def test_an_instruction_gives_a_loss(tmp_path):
    """The test above can fail."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 1e-4
    assert trainer.state.log_history[0]["grad_norm"] > 1e-3


def run(tmp_path, name, **overrides):
    """Final weights and logs of a run; each starts from the same weights and random state."""
    trainer = make_trainer(tmp_path / name, max_steps=4, **overrides)
    trainer.train()
    return parameters_of(trainer.model), trainer


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_refresh_at_every_step_equals_live(tmp_path, tuning):
    """An identity of the schedules, through the whole loop."""
    peft = {"peft_config": LoraConfig(**LORA)} if tuning == "lora" else {}
    live, _ = run(tmp_path, "live", teacher_model_kind="live", **peft)
    one, trainer = run(tmp_path, "one", teacher_sync_steps=1, **peft)
    assert trainer.teacher.refreshes == 4
    for name, value in live.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


def test_chunk_sizes_change_nothing(tmp_path, monkeypatch):
    """The chunks of the loss, and the blocks inside them."""
    whole, trainer = run(tmp_path, "whole")
    monkeypatch.setattr(kernel, "CPU_CHUNK_TOKENS", 5)
    monkeypatch.setattr(kernel_torch, "BLOCK_LOGITS", 2 * trainer.model.config.vocab_size)
    tiled, _ = run(tmp_path, "tiled")
    for name, value in whole.items():
        torch.testing.assert_close(tiled[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_autocast_and_checkpointing_change_little(tmp_path, tuning):
    """bf16 computes in bfloat16 on float32 weights, and a live teacher does not cut the student's gradient off."""
    peft = {"peft_config": LoraConfig(**LORA)} if tuning == "lora" else {}
    logs = {}
    for name, fields in {
        "plain": {},
        "bf16": {"bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
    }.items():
        _, trainer = run(
            tmp_path, name, teacher_model_kind="live", generation_kwargs={"do_sample": False}, **fields, **peft
        )
        logs[name] = trainer.state.log_history[0]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert logs["bf16"]["loss"] != logs["plain"]["loss"]
    assert logs["bf16"]["loss"] == pytest.approx(logs["plain"]["loss"], rel=0.15)
    assert logs["bf16"]["grad_norm"] == pytest.approx(logs["plain"]["grad_norm"], rel=0.15)
    assert logs["checkpointing"]["loss"] == pytest.approx(logs["plain"]["loss"], rel=1e-5)
    assert logs["checkpointing"]["grad_norm"] == pytest.approx(logs["plain"]["grad_norm"], rel=1e-4)


def test_prepare_inputs_is_the_parents_dict_and_the_teachers_prompts(tmp_path):
    """The same completion ids after other prompt ids, left-padded like prompt_ids, aligned after the shuffle."""
    trainer = make_trainer(tmp_path, "qwen3", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.model.train()
    batch = [trainer.train_dataset[i] for i in range(4)]
    tokenizer, pad = trainer.processing_class, trainer.processing_class.pad_token_id
    seen = []
    for step in range(2):
        trainer._step = step
        inputs = trainer._prepare_inputs(batch)
        assert set(inputs) == {
            "prompt_ids",
            "prompt_mask",
            "completion_ids",
            "completion_mask",
            "num_items_in_batch",
            "teacher_prompt_ids",
            "teacher_prompt_mask",
        }
        assert inputs["num_items_in_batch"] == 4
        for side in ("prompt", "teacher_prompt"):
            ids, mask = inputs[f"{side}_ids"], inputs[f"{side}_mask"]
            assert ids.shape == mask.shape
            assert torch.equal(ids == pad, mask == 0)
            assert mask[:, -1].all()
            assert (mask.diff(dim=1) >= 0).all()  # zeros, then ones
        for row in range(2):
            student = tokenizer.decode(inputs["prompt_ids"][row][inputs["prompt_mask"][row] == 1])
            teacher = tokenizer.decode(inputs["teacher_prompt_ids"][row][inputs["teacher_prompt_mask"][row] == 1])
            question = student.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            assert teacher == student.replace(question, f"{trainer.prompt_pairs.instruction}\n\n{question}")
            seen.append(question)
    assert sorted(seen) == sorted(row["prompt"][0]["content"] for row in batch)


def test_refreshes_come_before_the_rollout_and_are_logged(tmp_path):
    """Ages and counts at each step, for M = 2 and five steps; ages in whole steps under accumulation."""
    trainer = make_trainer(
        tmp_path, max_steps=5, teacher_sync_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["teacher/refreshes"] for log in logs] == [0, 1, 1, 2, 2]
    assert [log["teacher/age_steps"] for log in logs] == [0, 0, 1, 0, 1]
    for name in (
        "reverse_kl",
        "entropy",
        "teacher_entropy",
        "topk_overlap",
        "completions/relative_length",
        "completions/clipped_ratio",
        "completions/p95_length",
        "completions/repeats",
        "completions/empty",
        "completions/epistemic_words",
    ):
        assert all(math.isfinite(log[name]) for log in logs), name
    # With beta 1 and rollouts of one length, the loss is the mean reverse KL in either normalization
    assert logs[0]["loss"] == pytest.approx(logs[0]["reverse_kl"], rel=1e-3)
    assert logs[0]["completions/relative_length"] == 1.0


def test_relative_length_is_to_the_first_five_steps(tmp_path):
    """Fed with known mean lengths."""
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    relative = []
    for mean_length in (10.0, 20.0, 30.0, 20.0, 20.0, 5.0, 10.0):
        trainer._metrics["train"]["completions/mean_length"].append(mean_length)
        trainer._record_rollouts({})
        relative.append(trainer._metrics["train"]["completions/relative_length"][-1])
    assert relative[-3:] == [1.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("kind", "thinking", "answer"),
    # The generation prompt of DeepSeek-R1's template opens <think>, that of Qwen3's does not
    [
        ("qwen3", (0 + 3 + 2) / 3, (4 + 1 + 0) / 3),
        ("deepseek", (4 + 3 + 2) / 3, (0 + 1 + 0) / 3),
        ("llama", None, None),
    ],
)
def test_thinking_and_answer_tokens_are_logged_where_the_template_thinks(tmp_path, kind, thinking, answer):
    """Means over the rollouts, a tool's tokens left out; a Llama template has none."""
    trainer = make_trainer(tmp_path, kind)
    trainer.model.train()
    metrics = trainer._metrics["train"]
    metrics["completions/mean_length"].append(3.0)
    opened, closed = trainer._think_ids or (0, 0)
    prompt = trainer._tokenize_prompts([rows(1)[0]["prompt"]])[0][0]
    trainer._record_rollouts(
        {
            "prompt_ids": torch.tensor([prompt] * 3),
            # No thinking of its own; thinking and one token; thinking that a tool's two tokens interrupt
            "completion_ids": torch.tensor([[65] * 4, [opened, 65, closed, 66], [opened, 65, 65, 65]]),
            "completion_mask": torch.ones(3, 4, dtype=torch.long),
            "tool_mask": torch.tensor([[1] * 4, [1] * 4, [1, 0, 0, 1]]),
        }
    )
    found = [metrics.get(f"completions/mean_{name}_length") for name in ("thinking", "answer")]
    expected = [None if mean is None else [pytest.approx(mean)] for mean in (thinking, answer)]
    assert found == expected


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_measures_of_the_rollouts_texts_are_logged(tmp_path, mode):
    """The 95th percentile of the lengths, shares that repeat and are empty, words of doubt per 1,000 tokens; a tool's left out."""
    trainer = make_trainer(tmp_path)
    trainer.model.train(mode == "train")
    tokenizer = trainer.processing_class
    eos = tokenizer.eos_token_id
    texts = ["Wait, perhaps 4.", "no " * 25, "", "Maybe maybe"]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], eos] for text in texts]
    width = max(map(len, ids))
    by_tool = [[1] * width for _ in ids]
    by_tool[3][: len("Maybe ")] = [0] * len("Maybe ")
    trainer._record_texts(
        {
            # Padding that repeats itself is no text
            "completion_ids": torch.tensor([row + [65] * (width - len(row)) for row in ids]),
            "completion_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            "tool_mask": torch.tensor(by_tool),
        }
    )
    lengths = [17, 76, 1, 6]
    found = {name.removeprefix("completions/"): values for name, values in trainer._metrics[mode].items()}
    assert found == {
        # Between the largest two, as numpy's percentile
        "p95_length": [pytest.approx(np.percentile(lengths, 95))],
        "repeats": [0.25],
        "empty": [0.25],
        "epistemic_words": [pytest.approx(1000 * 3 / sum(lengths))],
    }


def test_teacher_prompt_column_wins(tmp_path):
    """The seam for privileged contexts; rows without it get the instruction."""
    dataset = Dataset.from_list(
        [
            {"prompt": "2 + 2 =", "teacher_prompt": "The answer is 4. 2 + 2 ="},
            {"prompt": "3 + 3 =", "teacher_prompt": None},
        ]
    )
    trainer = make_trainer(tmp_path, dataset=dataset, per_device_train_batch_size=2, instruction="Be very brief.")
    trainer.model.train()
    inputs = trainer._prepare_inputs(list(trainer.train_dataset))
    texts = sorted(trainer.processing_class.batch_decode(inputs["teacher_prompt_ids"], skip_special_tokens=True))
    assert texts == ["Be very brief.\n\n3 + 3 =", "The answer is 4. 2 + 2 ="]


def test_unused_columns_go_and_the_teachers_prompt_stays(tmp_path):
    """With TRL's remove_unused_columns."""
    dataset = Dataset.from_dict({"prompt": ["2 + 2 ="], "teacher_prompt": ["Answer 4. 2 + 2 ="], "source": ["x"]})
    trainer = make_trainer(
        tmp_path, dataset=dataset, per_device_train_batch_size=1, remove_unused_columns=True, max_steps=1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ids = trainer.processing_class("Answer 4. 2 + 2 =")["input_ids"]
    assert batch == [{"prompt": "2 + 2 =", "teacher_prompt_ids": ids}]


def test_rows_that_are_given_to_evaluate_get_their_teachers_prompts(tmp_path):
    trainer = make_trainer(tmp_path, dataset=rows(8), eval_dataset=rows(4))
    assert trainer.evaluate(rows(4))["eval_loss"] > 0
    with pytest.raises(ValueError, match="row 0: column 'prompt' holds an empty prompt"):
        trainer.evaluate(Dataset.from_list([{"prompt": ""}]))


def test_the_start_reports_rows_and_one_pair(tmp_path, capsys):
    """Counts of kept, dropped and replaced rows, and the first row as text, once."""
    opening = "Solve the following math problem step by step. "
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}]} for text in (opening + "1 + 1?", "2 + 2?", "x" * 600)]
    )
    make_trainer(tmp_path, "qwen3", dataset=dataset, max_prompt_length=500)
    printed = capsys.readouterr().out
    assert "2 of 3 rows kept; 1 dropped for a prompt of more than 500 tokens" in printed
    assert "In 1 of them the teacher's instruction replaces the student's own" in printed
    assert printed.count("--- student ---") == 1
    assert "<|im_start|>user\nSolve the following math problem step by step. 1 + 1?<|im_end|>" in printed
    assert "Be direct: avoid unnecessary elaboration" in printed


def test_an_instruction_to_replace_that_is_nowhere_warns(tmp_path):
    """A text that the user gave is expected somewhere; the default, which is for DAPO's rows, is not."""
    with pytest.warns(UserWarning, match="instruction_replaces='Think hard.' has no effect"):
        make_trainer(tmp_path, instruction_replaces="Think hard.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The global batch is")
        make_trainer(tmp_path)


def test_evaluation_gives_a_loss_and_leaves_the_teacher(tmp_path):
    """The same loss on held-out prompts; no refresh, and its rows are filtered too."""
    long = {"prompt": [{"role": "user", "content": "y" * 2000}]}
    held_out = Dataset.from_list([*rows(4), long])
    trainer = CRISPTrainer(
        model=tiny_model(),
        args=config(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2, max_steps=2),
        train_dataset=rows(),
        eval_dataset={"held_out": held_out},
        processing_class=tiny_tokenizer(),
    )
    assert (
        len(trainer.eval_dataset["held_out"]) == len(make_trainer(tmp_path, eval_dataset=held_out).eval_dataset) == 4
    )
    with pytest.raises(ValueError, match="the hard dataset has no row left"):
        make_trainer(tmp_path, eval_dataset={"hard": Dataset.from_list([long])})
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_held_out_loss" in log]
    assert len(evaluations) == 2
    for name in ("held_out_loss", "reverse_kl", "teacher_entropy"):
        assert all(math.isfinite(log[f"eval_{name}"]) for log in evaluations), name
    assert trainer.teacher.refreshes == 0


def test_a_stream_trains(tmp_path):
    """An IterableDataset is checked as it is read."""

    def stream():
        yield from rows(20)
        yield {"prompt": [{"role": "user", "content": "y" * 2000}]}

    trainer = make_trainer(tmp_path, dataset=IterableDataset.from_generator(stream), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_model_path_trains_and_saves_a_whole_model(tmp_path):
    """From a directory to a directory that transformers loads, with a card that names CRISP."""
    path = save_tiny(tmp_path / "base", "qwen3")
    trainer = CRISPTrainer(model=path, args=config(tmp_path / "out", max_steps=1), train_dataset=rows())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in reloaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2603.05433" in card
    assert not list((tmp_path / "out").rglob("*teacher*"))


def test_the_teacher_that_went_uniform_stops_the_run(tmp_path):
    """Weights that were never loaded: the student would train on noise while the loss looks healthy."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    with torch.no_grad():
        trainer.teacher._model.get_output_embeddings().weight.zero_()
    with pytest.raises(RuntimeError, match="within 1% of that of a uniform distribution"):
        trainer.train()


@pytest.mark.parametrize("teachers", [[5.7, 3.0], [3.0, 5.7]])
def test_a_teacher_that_is_uniform_in_one_micro_batch_is_no_fault(tmp_path, teachers):
    """Only a whole step says that the weights are not there."""
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert math.log(trainer.model.config.vocab_size) < 5.7
    for teacher_entropy_nats in teachers:
        trainer._step_entropies_nats.append((3.0, teacher_entropy_nats))
        trainer._check_teacher_is_not_uniform()


def test_a_uniform_student_and_teacher_are_no_fault(tmp_path):
    """A model from scratch starts there."""
    model = tiny_model(scale=0.0)
    make_trainer(tmp_path, model=model, max_steps=1).train()


def test_bf16_weights_at_the_papers_rate_are_refused_and_lora_at_it_warns(tmp_path):
    """Both would train without learning."""
    with pytest.raises(ValueError, match=r"learning_rate=1e-06 is too small for torch.bfloat16 weights: \d+%"):
        make_trainer(tmp_path, model=tiny_model().to(torch.bfloat16), learning_rate=1e-6)
    model = tiny_model().to(torch.bfloat16)
    # Its largest rate counts
    first, *rest = model.parameters()
    own = torch.optim.SGD([{"params": rest, "lr": 1e-6}, {"params": [first], "lr": 1e-2}])
    CRISPTrainer(
        model=model,
        args=config(tmp_path, learning_rate=1e-6),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        optimizers=(own, None),
    )
    make_trainer(tmp_path, learning_rate=0.0)
    with pytest.warns(UserWarning, match="a LoRA adapter hardly moves"):
        make_trainer(tmp_path, peft_config=LoraConfig(**LORA), learning_rate=1e-6)


def test_missing_and_visual_data_are_refused_before_the_model_is_loaded(tmp_path):
    """The model's path does not exist, and is not what the message is about."""
    for dataset, message in (
        (Dataset.from_dict({"question": ["1 + 1?"]}), "no column 'prompt'; it has question"),
        (Dataset.from_dict({"prompt": ["1 + 1?"], "image": [0]}), "vision inputs are not supported"),
        (None, "needs a `train_dataset`"),
    ):
        with pytest.raises(ValueError, match=message):
            CRISPTrainer(model="no/such-model", args=config(tmp_path), train_dataset=dataset)
    with pytest.raises(ValueError, match="'v9' is not a name in the catalogue"):
        CRISPTrainer(model="no/such-model", args=config(tmp_path, instruction="v9"), train_dataset=rows())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_resumed_run_has_the_teacher_of_the_uninterrupted_one(tmp_path, tuning):
    """Refreshed at step 2, resumed after step 3, refreshed again at step 4: weights, age and count go on."""

    def trainer(name, **overrides):
        return make_trainer(
            tmp_path / name,
            peft_config=LoraConfig(**LORA) if tuning == "lora" else None,
            max_steps=5,
            save_strategy="steps",
            save_steps=3,
            teacher_sync_steps=2,
            shuffle_dataset=False,
            generation_kwargs={"do_sample": False},
            **overrides,
        )

    whole = trainer("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    state = json.loads((checkpoint / "teacher_state.json").read_text())
    assert (state["kind"], state["refreshes"], state["weights_from"]) == ("periodic", 1, "file")

    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in parameters_of(whole.model).items():
        assert torch.equal(parameters_of(resumed.model)[name], value), name
    last = [[log for log in t.state.log_history if "loss" in log][-1] for t in (whole, resumed)]
    for name in ("loss", "reverse_kl", "teacher/age_steps", "teacher/refreshes", "completions/relative_length"):
        assert last[0][name] == last[1][name], name
    assert len(whole._baseline_lengths_tokens) == 5
    assert resumed._baseline_lengths_tokens == whole._baseline_lengths_tokens

    (checkpoint / "teacher_state.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be resumed: its teacher_state\.json is missing"):
        trainer("torn").train(resume_from_checkpoint=str(checkpoint))


def test_a_teacher_that_was_never_refreshed_is_not_written(tmp_path):
    """It is made anew from the base model; the final model has no teacher either way."""
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert {path.name for path in (tmp_path / "checkpoint-2").glob("teacher*")} == {"teacher_state.json"}
    resumed = make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.teacher.age_steps == 2


def test_logs_are_json(tmp_path):
    """What a tracker gets has no tensor in it."""
    trainer = make_trainer(tmp_path, "qwen3", max_steps=2)
    trainer.train()
    json.dumps(trainer.state.log_history)


def with_masked_tokens(model, ids: list[int]):
    """Give a model a head with a bias that masks tokens."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.normal_(std=0.1)
        head.bias[ids] = -torch.inf
    model.lm_head = head
    return model


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("beta", "teacher"), [(1.0, "periodic"), (0.5, "periodic"), (0.0, "periodic"), (1.0, "ema")])
def test_tokens_that_the_head_masks_train_as_if_they_were_not_there(tmp_path, beta, teacher, tuning):
    """Losses and gradients are finite, the mask stays, and the moving average of two masks is a mask."""
    masked = [30, 35, 40]
    trainer = make_trainer(
        tmp_path,
        model=with_masked_tokens(tiny_model(), masked),
        peft_config=LoraConfig(**LORA) if tuning == "lora" else None,
        beta=beta,
        teacher_model_kind=teacher,
        teacher_sync_steps=1,
        teacher_update_rate=0.3 if teacher == "ema" else None,
        logging_nan_inf_filter=False,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3
    for log in logs:
        assert 0 < log["loss"] < 10
        assert 0 < log["grad_norm"] < 1e3
        assert 0 < log["reverse_kl"] < 10
        assert 0 < log["entropy"] < 10
    with trainer.teacher.serving() as served:
        for model in (trainer.model, served):
            bias = model.get_output_embeddings().bias
            assert torch.isneginf(bias).nonzero().flatten().tolist() == masked
            assert not any(torch.isnan(parameter).any() for parameter in model.parameters())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_float16_weights_are_refused(tmp_path, tuning):
    """Unless they are frozen: PEFT keeps an adapter in float32."""
    if tuning == "full":
        with pytest.raises(ValueError, match="trainable weights are float16"):
            make_trainer(tmp_path, model=tiny_model().to(torch.float16))
        return
    trainer = make_trainer(tmp_path, model=tiny_model().to(torch.float16), peft_config=LoraConfig(**LORA))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    frozen = get_peft_model(tiny_model().to(torch.float16), LoraConfig(**LORA), autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match="trainable weights are float16"):
        make_trainer(tmp_path, model=frozen)


@pytest.mark.parametrize(("instruction", "warns"), [("v1", True), ("general", False)])
def test_rows_that_are_no_math_get_a_word_about_general(tmp_path, instruction, warns):
    facts = Dataset.from_list([{"prompt": [{"role": "user", "content": "Who wrote Hamlet?"}]}] * 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make_trainer(tmp_path, dataset=facts, instruction=instruction)
        make_trainer(tmp_path, instruction=instruction)
    words = [str(one.message) for one in said if "speaks of a math problem" in str(one.message)]
    assert words == (
        [
            "instruction='v1' speaks of a math problem, but only 0% of the first 5 prompts look like one. Set instruction='general', "
            "or your own text."
        ]
        if warns
        else []
    )


def test_persistent_workers_evaluate_the_rows_that_are_given(tmp_path):
    """transformers keeps the first loader, and would answer with it for any other rows."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "per_device_eval_batch_size": 1}
    trainer = make_trainer(tmp_path, eval_dataset=rows(3), **workers)
    assert [len(trainer.get_eval_dataloader(dataset)) for dataset in (rows(1), None, rows(2), None)] == [1, 3, 2, 3]


def test_a_second_run_of_the_same_trainer_counts_the_teachers_age_on(tmp_path):
    trainer = make_trainer(tmp_path, teacher_sync_steps=2)
    for _ in range(2):
        trainer.train()
    # Refreshed at the start of step 2, and again of the second run's step 2
    assert [log["teacher/age_steps"] for log in trainer.state.log_history if "loss" in log] == [2, 0, 1]
    assert trainer.teacher.refreshes == 2
