"""The reverse KL of a preflight is the one that the trainer logs at its first step, and that of a loop over tokens."""

import pytest
import torch

from tests.helpers import make_trainer
from tests.tiny_models import tiny_model
from trl_crisp.preflight import divergence
from trl_crisp.preflight.divergence import mean_reverse_kl

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is")


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_it_is_the_first_reverse_kl_that_training_logs(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind, per_device_train_batch_size=8, max_steps=1, max_completion_length=24)
    rollouts = []
    generate = trainer._generate_and_score_completions

    def record(inputs):
        output = generate(inputs)
        rollouts.extend(
            [
                ids[mask.bool()].tolist()
                for ids, mask in zip(output[f"{name}_ids"], output[f"{name}_mask"], strict=True)
            ]
            for name in ("prompt", "teacher_prompt", "completion")
        )
        return output

    trainer._generate_and_score_completions = record
    # Before the step changes the weights
    model = tiny_model(kind)
    trainer.train()
    students, teachers, completions = rollouts
    assert len(completions) == 8
    [found] = mean_reverse_kl(model, students, [teachers], completions, pass_positions=False)
    logged = next(log["reverse_kl"] for log in trainer.state.log_history if "reverse_kl" in log)
    assert found > 0.01
    assert found == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_it_is_that_of_a_loop_over_tokens(monkeypatch, kind, batch_tokens):
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(40)
    else:
        model = tiny_model(kind)
    monkeypatch.setattr(divergence, "_BATCH_TOKENS", batch_tokens)
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(1, 50, (count,), generator=generator).tolist()

    students = [draw(n) for n in (3, 5, 4)]
    teachers = [[draw(n) for n in lengths] for lengths in ((6, 4, 9), (3, 7, 8))]
    completions = [draw(n) for n in (1, 6, 4)]
    found = mean_reverse_kl(model, students, teachers, completions, pass_positions=kind == "gpt2")
    for kind_number, prompts in enumerate(teachers):
        values = []
        for student, teacher, completion in zip(students, prompts, completions, strict=True):
            logs = []
            for prompt in (student, teacher):
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
                logs.append(logits.log_softmax(-1))
            for t in range(len(completion)):
                q, p = logs[0][t], logs[1][t]
                values.append(sum(q[v].exp().item() * (q[v] - p[v]).item() for v in range(len(q))))
        assert len(values) == 11
        assert found[kind_number] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_the_same_prompt_has_none():
    completions = [[5, 6, 7]]
    found = mean_reverse_kl(tiny_model(), [[1, 2]], [[[1, 2]], [[9, 2]]], completions, False)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] > 0.01


def test_the_modes_of_the_model_are_left_alone_and_progress_ends_at_all_rows():
    model = tiny_model().train()
    done = []
    mean_reverse_kl(model, [[1], [2]], [[[3], [4]]], [[5], [6, 7]], False, done.append)
    assert model.training
    assert done[-1] == 2
