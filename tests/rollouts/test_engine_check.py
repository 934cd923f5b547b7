"""Whether vLLM samples from the student: the numbers against float64, in real runs on an engine of our own; what stops a run."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests import oracles
from tests.helpers import make_trainer
from tests.receiving_engine import engine_like, receiving, truncated
from tests.tiny_models import tiny_model
from trl_crisp.loss.divergence import OutputHead
from trl_crisp.models.hidden_states import has_dropout
from trl_crisp.rollouts.engine_check import (
    COMPARED_TOKENS,
    EVERY_STEPS,
    FIRST_STEPS,
    MEAN_GAP_LIMIT_NATS,
    OFF_SHARE_LIMIT,
    EngineCheck,
    Recorded,
    Sampling,
    engine_gap,
    sampled_log_probs,
)

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")

TRUNCATIONS = {
    "temperature": {"temperature": 0.6},
    "top_p": {"temperature": 0.6, "top_p": 0.8},
    "top_k": {"top_k": 5},
    "min_p": {"temperature": 1.3, "min_p": 0.05},
    "all": {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
}


def run(tmp_path, monkeypatch, engine=None, model=None, after=None, **settings):
    """Train on an engine of our own, and return the trainer and the engine."""
    model = tiny_model() if model is None else model
    with receiving(engine or engine_like(model), monkeypatch) as engine:
        trainer = make_trainer(tmp_path, model=model, **{"use_vllm": True, "max_steps": 2, **settings})
        if after is not None:
            after(trainer, engine)
        trainer.train()
    return trainer, engine


def logged(trainer, name: str) -> list[float]:
    return [log[f"vllm/{name}"] for log in trainer.state.log_history if f"vllm/{name}" in log]


# The numbers


@pytest.mark.parametrize("sampling", TRUNCATIONS.values(), ids=TRUNCATIONS)
def test_the_distribution_is_the_engines(sampling):
    generator = torch.Generator().manual_seed(0)
    logits_NV = 3 * torch.randn(6, 40, generator=generator)
    settings = Sampling(**sampling)
    for logits_V in logits_NV:
        kept_V = truncated(logits_V / settings.temperature, settings._asdict())
        for token in kept_V.isfinite().nonzero().flatten().tolist():
            kept = [value for value in kept_V.tolist() if value > -math.inf]
            expected = kept_V[token].item() - math.log(sum(math.exp(value) for value in kept))
            actual = sampled_log_probs(logits_V[None], torch.tensor([token]), settings).item()
            assert actual == pytest.approx(expected, abs=2e-5)


def test_a_token_at_the_border_of_the_nucleus_has_a_finite_value():
    """The student's rounding may leave out what the engine's kept."""
    logits_NV = torch.tensor([[2.0, 1.0, 0.0]])
    least = sampled_log_probs(logits_NV, torch.tensor([2]), Sampling(top_k=2)).item()
    log_probs = logits_NV[0].log_softmax(0)
    assert least == pytest.approx((log_probs[2] - log_probs[:2].logsumexp(0)).item(), abs=1e-6)


def test_gaps_are_counted_where_the_engine_has_a_value():
    generator = torch.Generator().manual_seed(0)
    hidden_BTH = torch.randn(2, 4, 8, generator=generator)
    head = OutputHead(torch.randn(11, 8, generator=generator), logit_scale=0.5, softcap=3.0)
    ids_BT = torch.randint(0, 11, (2, 4), generator=generator)
    offsets_BT = torch.tensor([[0.5, -0.25, 0.0, 2.0], [-1.5, 0.125, math.nan, math.nan]])
    exact_BT = torch.zeros(2, 4)
    for row in range(2):
        for position in range(4):
            logits = hidden_BTH[row, position].double() @ head.weight_VH.double().T * 0.5
            logits = 3.0 * torch.tanh(logits / 3.0) / 0.7
            exact_BT[row, position] = oracles._log_softmax(logits.tolist())[ids_BT[row, position]]
    gap = engine_gap(hidden_BTH, head, ids_BT, exact_BT + offsets_BT, Sampling(temperature=0.7))
    assert gap.nats.item() == pytest.approx(0.5 + 0.25 + 2.0 + 1.5 + 0.125, abs=1e-5)
    assert (gap.off.item(), gap.tokens.item()) == (2, 6)


def test_at_most_so_many_tokens_are_compared():
    hidden_BTH = torch.zeros(2, COMPARED_TOKENS, 8)
    gap = engine_gap(
        hidden_BTH,
        OutputHead(torch.zeros(11, 8)),
        torch.zeros(2, COMPARED_TOKENS).long(),
        torch.full((2, COMPARED_TOKENS), -math.log(11.0)),
        Sampling(),
    )
    assert gap.tokens.item() == COMPARED_TOKENS
    assert gap.nats.item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("value", [None, math.nan, -math.inf])
def test_a_value_that_is_no_number_counts_as_off(value):
    """An engine whose weights are gone gives NaN, for which TRL writes None."""
    recorded = Recorded()
    recorded.take(lambda: (None, [[3, 4]], [[[value], [-0.5]]], [[[3], [4]]]))
    log_probs_BT = recorded.log_probs(torch.tensor([[3, 4, 0]]))
    assert log_probs_BT.tolist()[0][:2] == [-math.inf, -0.5]
    assert log_probs_BT[0, 2].isnan()
    head = OutputHead(torch.zeros(11, 8))
    gap = engine_gap(torch.zeros(1, 3, 8), head, torch.tensor([[3, 4, 0]]), log_probs_BT, Sampling())
    assert (gap.nats.item(), gap.off.item(), gap.tokens.item()) == (math.inf, 2, 2)


def test_the_sampled_token_is_found_among_the_most_likely():
    recorded = Recorded()
    recorded.take(lambda: (None, [[7]], [[[-0.1, -2.5]]], [[[5, 7]]]))
    assert recorded.log_probs(torch.tensor([[7]])).item() == -2.5


# In runs


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("sampling", [*TRUNCATIONS.values(), {"loss_temperature": 0.5}], ids=[*TRUNCATIONS, "loss"])
def test_an_engine_that_is_the_student_has_no_gap(tmp_path, monkeypatch, mode, sampling):
    """At the rollouts' temperature, also if the loss has another; with micro-batches that are sorted and trimmed."""
    trainer, _ = run(
        tmp_path,
        monkeypatch,
        vllm_mode=mode,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        **sampling,
    )
    assert logged(trainer, "mean_gap_nats") == pytest.approx([0.0, 0.0], abs=1e-5)
    assert logged(trainer, "off_share") == [0.0, 0.0]


def test_the_mean_gap_is_that_of_the_steps_tokens(tmp_path, monkeypatch):
    """An engine with another temperature, against the sum over its tokens in float64."""
    temperature = 0.9
    model = tiny_model()
    prompts, expected = [], []

    def watch(trainer, engine):
        engine.distort = lambda logits: logits / temperature
        sample = engine.sample

        def sampled(prompts_now, sampling):
            rows = sample(prompts_now, sampling)
            for prompt, (ids, values) in zip(prompts_now, rows, strict=True):
                with torch.no_grad():
                    logits = oracles.completion_logits(trainer.model, list(prompt), ids).double()
                own = logits.log_softmax(dim=-1)[range(len(ids)), ids]
                prompts.append(prompt)
                expected.extend((torch.tensor(values).double() - own).abs().tolist())
            return rows

        engine.sample = sampled

    trainer, _ = run(
        tmp_path,
        monkeypatch,
        model=model,
        after=watch,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert len(prompts) == 4
    assert logged(trainer, "mean_gap_nats") == pytest.approx([sum(expected) / len(expected)], abs=1e-5)
    assert logged(trainer, "mean_gap_nats")[0] > 0.01


def test_an_engine_with_stale_weights_stops_the_run(tmp_path, monkeypatch):
    def deafen(trainer, engine):
        engine.is_deaf = True
        with torch.no_grad():
            trainer.model.get_output_embeddings().weight.mul_(-1)

    with pytest.raises(
        RuntimeError, match=r"vLLM does not sample from the student.*step 1 .*stale weights.*quantiz"
    ) as e:
        run(tmp_path, monkeypatch, after=deafen)
    assert "asleep" not in str(e.value)


def test_an_engine_that_sleeps_between_the_steps_is_the_student(tmp_path, monkeypatch):
    """Each push brings the weights that the sleep discarded."""
    trainer, engine = run(tmp_path, monkeypatch, vllm_enable_sleep_mode=True, learning_rate=1e-2)
    assert logged(trainer, "mean_gap_nats") == pytest.approx([0.0, 0.0], abs=1e-5)
    assert engine.resets == 2


def test_an_engine_that_stays_asleep_stops_the_run(tmp_path, monkeypatch):
    def deafen(trainer, engine):
        engine.is_deaf = True
        # It samples something all the same
        engine.distort = lambda logits: torch.zeros_like(logits)

    with pytest.raises(RuntimeError, match="an engine that is asleep"):
        run(tmp_path, monkeypatch, after=deafen, vllm_enable_sleep_mode=True, model=tiny_model(scale=64.0))


def test_a_server_with_raw_log_probabilities_stops_the_run(tmp_path, monkeypatch):
    def raw(trainer, engine):
        sample = engine.sample
        engine.sample = lambda prompts, sampling: [
            (ids, [value / 4 for value in values]) for ids, values in sample(prompts, sampling)
        ]

    with pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs"):
        run(tmp_path, monkeypatch, after=raw, vllm_mode="server")


def test_an_engine_without_log_probabilities_warns(tmp_path, monkeypatch):
    def mute(trainer, engine):
        generate = engine.generate
        engine.generate = lambda *args, **kwargs: {**generate(*args, **kwargs), "logprobs": None}

    with pytest.warns(UserWarning, match="returned no log-probabilities"):
        trainer, _ = run(tmp_path, monkeypatch, after=mute, vllm_mode="server")
    assert logged(trainer, "mean_gap_nats") == []


def test_rollouts_of_an_evaluation_are_not_compared(tmp_path, monkeypatch):
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(4)]
    settings = {"eval_dataset": Dataset.from_list(rows), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer, engine = run(tmp_path, monkeypatch, **settings)
    [evaluation] = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert not [name for name in evaluation if "vllm" in name]
    assert logged(trainer, "off_share") == [0.0]
    # The weights after the step
    assert engine.resets == 2


def test_lora_is_compared_too(tmp_path, monkeypatch):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    trainer, _ = run(tmp_path, monkeypatch, peft_config=lora, learning_rate=1e-2)
    assert logged(trainer, "mean_gap_nats") == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("where", ["adapter", "attention"])
def test_dropout_of_the_student_is_no_gap(tmp_path, monkeypatch, where):
    """The engine has none. The loss keeps its dropout."""
    if where == "adapter":
        model, lora = (
            tiny_model(),
            LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5),
        )
    else:
        model, lora = tiny_model(attention_dropout=0.5), None
    trainer, _ = run(tmp_path, monkeypatch, model=model, peft_config=lora, learning_rate=1e-2)
    assert logged(trainer, "mean_gap_nats") == pytest.approx([0.0, 0.0], abs=1e-5)
    assert all(module.training for module in trainer.model.modules())
    assert has_dropout(trainer.model)
    assert not has_dropout(tiny_model())


# When, and what it says


def generation(**settings) -> SimpleNamespace:
    defaults = {**Sampling()._asdict(), "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": {}}
    return SimpleNamespace(
        **{**defaults, "structured_outputs_regex": None, "mode": "colocate", "enable_sleep_mode": False, **settings}
    )


def test_the_first_steps_and_then_some_are_compared():
    check = EngineCheck(generation())
    first = [step for step in range(1, 101) if check.is_due(step)]
    assert first == [1, 2, 3, 25, 50, 75, 100]
    check.begin_run()
    resumed = [step for step in range(31, 101) if check.is_due(step)]
    assert resumed == [31, 32, 33, 50, 75, 100]
    assert (FIRST_STEPS, EVERY_STEPS) == (3, 25)


@pytest.mark.parametrize(
    ("sums", "stops"),
    [
        ((100 * MEAN_GAP_LIMIT_NATS, 0, 100), False),
        ((101 * MEAN_GAP_LIMIT_NATS, 0, 100), True),
        ((0.0, 100 * OFF_SHARE_LIMIT, 100), False),
        ((0.0, 100 * OFF_SHARE_LIMIT + 1, 100), True),
        ((math.nan, 0, 100), True),
        ((math.inf, 0, 100), True),
    ],
)
def test_the_limits(sums, stops):
    check = EngineCheck(generation())
    # Of two micro-batches
    check.add(*sums)
    check.add(0.0, 0.0, 0.0)
    if stops:
        with pytest.raises(RuntimeError, match="over 100 tokens of step 7"):
            check.judge(7)
    else:
        mean = check.judge(7)
        assert mean == {"vllm/mean_gap_nats": sums[0] / 100, "vllm/off_share": sums[1] / 100}
    # The next step begins with nothing
    assert check.judge(8) == {}


def test_the_engines_own_settings_override():
    check = EngineCheck(generation(temperature=0.7, top_k=-1, generation_kwargs={"temperature": 0.9, "min_p": 0.1}))
    assert check.sampling == Sampling(0.9, 1.0, -1, 0.1)
    assert check.is_due(1)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.1},
        {"structured_outputs_regex": "[0-9]+"},
        {"generation_kwargs": {"frequency_penalty": 0.5}},
        {"generation_kwargs": {"logit_bias": {3: 1.0}}},
        {"generation_kwargs": {"temperature": 0.0}},
    ],
)
def test_a_distribution_that_is_not_known_is_not_compared(settings):
    with pytest.warns(UserWarning, match="are not compared with the student's, because of"):
        check = EngineCheck(generation(**settings))
    assert not check.is_due(1)


@pytest.mark.parametrize(
    "kwargs", [{"seed": 3, "stop_token_ids": [1]}, {"repetition_penalty": 1.0}, {"min_tokens": 0}]
)
def test_settings_that_leave_the_distribution_alone(recwarn, kwargs):
    assert EngineCheck(generation(generation_kwargs=kwargs)).is_due(1)
    assert not recwarn.list
