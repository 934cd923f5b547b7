"""A teacher on the host: when it comes and goes, and that nothing else changes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from tests.helpers import config, make_trainer, parameters_of
from tests.tiny_models import tiny_model
from trl_crisp.models.hidden_states import backbone
from trl_crisp.teacher import CopyTeacher
from trl_crisp.teacher.offload import HostWeights

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is", "ignore:teacher_sync_steps=", "ignore:teacher_offload has no effect on a CPU"
)
META = torch.device("meta")
KINDS = {
    "periodic": {"teacher_sync_steps": 2},
    "ema": {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3},
    "ema in bfloat16": {
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.3,
        "teacher_model_init_kwargs": {"dtype": "bfloat16"},
    },
    "base": {"teacher_model_kind": "base"},
}


def offloaded(student, tmp_path, **overrides) -> CopyTeacher:
    """A teacher whose device is `meta`, which has no memory: a stand-in for a GPU. All else is as it runs there."""
    teacher = CopyTeacher(student, config(tmp_path, teacher_offload=True, **overrides), Accelerator(cpu=True))
    teacher._host._devices = [META] * len(teacher._host._devices)
    return teacher


def devices(model) -> dict[str, str]:
    return {name: parameter.device.type for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_weights_are_on_the_device_for_the_pass_only_and_the_head_always(tmp_path, kind):
    """Tied heads are the embedding too, and stay."""
    student = tiny_model(kind)
    teacher = offloaded(student, tmp_path)
    head = teacher._model.get_output_embeddings().weight
    stays = {name for name, parameter in teacher._model.named_parameters() if parameter is head}
    assert len(stays) == 1
    names = devices(student).keys()
    assert set(devices(teacher._model).values()) == {"cpu"}
    before = parameters_of(teacher._model)
    for _ in range(2):
        with teacher.serving() as model:
            assert devices(model) == {name: "cpu" if name in stays else "meta" for name in names}
        assert set(devices(teacher._model).values()) == {"cpu"}
    for name, value in parameters_of(teacher._model).items():
        assert torch.equal(value, before[name]), name


def test_fetching_early_is_the_same(tmp_path):
    teacher = offloaded(tiny_model(), tmp_path)
    teacher.fetch()
    assert "meta" in devices(teacher._model).values()
    teacher.fetch()
    with teacher.serving() as model:
        assert "meta" in devices(model).values()
    assert set(devices(teacher._model).values()) == {"cpu"}


def test_an_error_in_the_pass_sends_the_weights_back(tmp_path):
    teacher = offloaded(tiny_model(), tmp_path)
    with pytest.raises(KeyError), teacher.serving():
        raise KeyError
    assert set(devices(teacher._model).values()) == {"cpu"}


@pytest.mark.parametrize("kind", ["periodic", "ema", "ema in bfloat16"])
def test_a_refresh_and_a_load_write_to_the_host(tmp_path, kind):
    """Also right after a fetch, when the parameters are those on the device."""
    student = tiny_model()
    teacher = offloaded(student, tmp_path, **KINDS[kind])
    plain = CopyTeacher(copy.deepcopy(student), config(tmp_path, **KINDS[kind]), Accelerator(cpu=True))
    for model in (student, plain.student):
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
    teacher.fetch()
    teacher.refresh()
    plain.refresh()
    assert_equal(teacher, plain)
    state = copy.deepcopy(teacher.state_dict())
    for weights in state["weights"].values():
        weights += 1
    teacher.fetch()
    teacher.load_state_dict(state)
    plain.load_state_dict(state)
    assert_equal(teacher, plain)


def assert_equal(teacher, plain):
    weights, expected = teacher.state_dict()["weights"], plain.state_dict()["weights"]
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    for name, value in parameters_of(teacher._model).items():
        assert torch.equal(value, parameters_of(plain._model)[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_resuming_are_the_same_bit_by_bit(tmp_path, kind):
    """Four steps of two micro-batches with an evaluation, uninterrupted with and without; and from the checkpoint of step 2."""
    fields = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        **KINDS[kind],
    }
    rows = make_trainer(tmp_path / "rows", max_steps=1).train_dataset.select_columns(["prompt"])
    ends = {}
    for name, offload, checkpoint in (
        ("without", False, None),
        ("with", True, None),
        ("resumed", True, "checkpoint-2"),
    ):
        directory = tmp_path / ("with" if checkpoint else name)
        trainer = make_trainer(directory, eval_dataset=rows, teacher_offload=offload, **fields)
        assert trainer.teacher.is_offloaded == offload
        trainer.train(str(directory / checkpoint) if checkpoint else None)
        logs = [
            {k: v for k, v in log.items() if "time" not in k and "second" not in k}
            for log in trainer.state.log_history
        ]
        ends[name] = (parameters_of(trainer.model), parameters_of(trainer.teacher._model), logs[:-1])
        # The hidden states of a step are freed as it is trained on
        assert not any("teacher_output" in inputs for inputs in trainer._buffered_inputs)
    for name in ("with", "resumed"):
        for mine, expected in zip(ends[name][:2], ends["without"][:2], strict=True):
            assert all(torch.equal(value, expected[key]) for key, value in mine.items()), name
        assert ends[name][2] == ends["without"][2]


def test_one_visit_a_step_which_begins_before_the_rollouts_and_ends_before_the_student_trains(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, teacher_offload=True, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=2
    )
    events: list[str] = []

    def record(owner, method, name):
        original = getattr(owner, method)

        def recorded(*args, **kwargs):
            events.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, recorded)

    record(trainer, "_generate_single_turn", "rollouts")
    for method in ("fetch", "wait", "release"):
        record(trainer.teacher._host, method, method)
    backbone(trainer.teacher._model).register_forward_pre_hook(lambda *_: events.append("teacher"))
    backbone(trainer.model).register_forward_pre_hook(
        lambda *_: events.append("student") if torch.is_grad_enabled() else None
    )
    trainer.train()
    step = ["fetch", "rollouts", "fetch", "wait", "teacher", "teacher", "release", "student", "student"]
    assert events == 2 * step


def test_on_a_cpu_it_warns(tmp_path):
    with pytest.warns(UserWarning, match="teacher_offload has no effect on a CPU"):
        make_trainer(tmp_path, teacher_offload=True)


@pytest.mark.parametrize(
    ("accelerator", "words"),
    [
        (SimpleNamespace(distributed_type=DistributedType.DEEPSPEED), ["DeepSpeed", "offload_param_device: cpu"]),
        (
            SimpleNamespace(
                distributed_type=DistributedType.FSDP,
                state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)),
            ),
            ["FSDP", "fsdp_offload_params: true"],
        ),
    ],
    ids=["deepspeed", "fsdp2"],
)
def test_backends_that_place_the_weights_are_named(accelerator, words):
    from trl_crisp.teacher.sharding import check_offload

    with pytest.raises(ValueError, match="teacher_offload=True") as caught:
        check_offload(accelerator)
    assert all(word in str(caught.value) for word in words)


def test_weights_on_the_host_are_not_copied():
    """Neither to the host, nor back."""
    layer = torch.nn.Linear(3, 3).requires_grad_(False)
    before = dict(layer.named_parameters())
    weights = HostWeights(layer)
    weights.fetch()
    weights.wait()
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())


def test_a_tied_weight_is_moved_once_and_stays_tied():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    weights = HostWeights(model.requires_grad_(False))
    weights._devices = [META]
    weights.fetch()
    assert model["a"].weight.device == META
    assert model["b"].weight is model["a"].weight
    weights.release()
    assert model["a"].weight.device.type == "cpu"
    assert model["b"].weight is model["a"].weight
