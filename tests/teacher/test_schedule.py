"""Who the teacher is, when it is refreshed, and that its pass leaves the student alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.helpers import config, made_up_rollouts, make_trainer, parameters_of, rows
from tests.tiny_models import tiny_model
from trl_crisp.teacher import AdapterTeacher, CopyTeacher, LiveTeacher, make_teacher

pytestmark = pytest.mark.filterwarnings(
    "ignore:The global batch is", "ignore:teacher_sync_steps=", "ignore:The teacher follows the student"
)

KINDS = {
    "periodic": {"teacher_model_kind": "periodic", "teacher_sync_steps": 3},
    "base": {"teacher_model_kind": "base"},
    "ema": {"teacher_model_kind": "ema", "teacher_sync_steps": 2, "teacher_update_rate": 0.3},
    "live": {"teacher_model_kind": "live"},
}


def lora(**overrides) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **overrides})


def lora_model(seed: int = 0, **overrides) -> PeftModel:
    """A LoRA model whose adapter has been trained already: it is no identity."""
    model = get_peft_model(tiny_model(), lora(**overrides))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


def perturb(model, seed: int) -> None:
    """What an optimizer step does to a student, as far as the teacher is concerned."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def teacher_of(model, tmp_path, **overrides):
    return make_teacher(model, config(tmp_path, **overrides), Accelerator(cpu=True))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


def served_logits(teacher) -> torch.Tensor:
    with torch.no_grad(), teacher.serving() as model:
        return logits(model)


class SeparateTeacher:
    """The oracle of a schedule: whole models, copied and averaged one parameter at a time in float64."""

    def __init__(self, student, kind, sync_steps=None, rate=1.0):
        self.student, self.kind, self.sync_steps, self.rate = student, kind, sync_steps, rate
        self.model = copy.deepcopy(student).eval()

    def begin_step(self, step):
        if self.kind == "live":
            self.model.load_state_dict(self.student.state_dict())
        elif self.kind in ("periodic", "ema") and step % self.sync_steps == 0:
            for mine, theirs in zip(self.model.parameters(), self.student.parameters(), strict=True):
                mine.data = ((1 - self.rate) * mine.double() + self.rate * theirs.double()).float().data


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_each_schedule_equals_a_separate_model(tmp_path, kind, tuning):
    """Shared or copied, the teacher answers as a separate model on the same schedule does, at every step of seven."""
    student = lora_model() if tuning == "lora" else tiny_model()
    fields = KINDS[kind]
    oracle = SeparateTeacher(
        copy.deepcopy(student), kind, fields.get("teacher_sync_steps"), fields.get("teacher_update_rate", 1.0)
    )
    teacher = teacher_of(student, tmp_path, **fields)
    for step in range(1, 8):
        teacher.begin_step(step)
        oracle.begin_step(step)
        torch.testing.assert_close(served_logits(teacher), logits(oracle.model), rtol=1e-5, atol=1e-5)
        perturb(student, seed=step)
        perturb(oracle.student, seed=step)
    assert not torch.allclose(logits(student), logits(oracle.model), atol=1e-2)


@pytest.mark.parametrize(("tuning", "kind"), [("full", CopyTeacher), ("lora", AdapterTeacher)])
def test_the_kind_of_teacher_follows_the_kind_of_model(tmp_path, tuning, kind):
    """Copies under full fine-tuning, an adapter under LoRA, the student where it is live."""
    model = lora_model() if tuning == "lora" else tiny_model()
    assert isinstance(teacher_of(model, tmp_path), kind)
    model = lora_model() if tuning == "lora" else tiny_model()
    assert isinstance(teacher_of(model, tmp_path, teacher_model_kind="live"), LiveTeacher)


@pytest.mark.parametrize(
    ("sync_steps", "due"),
    [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [3, 6]), (6, [6]), (7, []), (100, [])],
)
def test_refresh_times_are_those_of_algorithm_1(tmp_path, sync_steps, due):
    """At the start of step k, counted from 1, when k is a multiple of M; the age counts updates since."""
    teacher = teacher_of(tiny_model(), tmp_path, teacher_sync_steps=sync_steps)
    refreshed, last = [], 1
    for step in range(1, 7):
        before = teacher.refreshes
        teacher.begin_step(step)
        if teacher.refreshes > before:
            refreshed.append(step)
            last = step
        assert teacher.age_steps == step - last
    assert refreshed == due


def test_m_100_never_refreshes_within_99_steps(tmp_path):
    """The paper's frozen setting."""
    teacher = teacher_of(tiny_model(), tmp_path, teacher_sync_steps=100)
    for step in range(1, 100):
        teacher.begin_step(step)
    assert teacher.refreshes == 0
    assert teacher.age_steps == 98


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_ema_at_rate_one_equals_refresh(tmp_path, tuning):
    """An identity of the schedules."""
    students = [lora_model() if tuning == "lora" else tiny_model() for _ in range(2)]
    periodic = teacher_of(students[0], tmp_path, teacher_sync_steps=2)
    ema = teacher_of(students[1], tmp_path, teacher_model_kind="ema", teacher_sync_steps=2, teacher_update_rate=1.0)
    for step in range(1, 6):
        for teacher in (periodic, ema):
            teacher.begin_step(step)
            perturb(teacher.student, seed=step)
        assert torch.equal(served_logits(periodic), served_logits(ema))
        assert periodic.age_steps == ema.age_steps


def test_a_bfloat16_teacher_keeps_its_average_in_float32(tmp_path):
    """Many updates of 0.001 add up; in bfloat16 each would round to nothing."""
    student = tiny_model().to(torch.bfloat16)
    teacher = teacher_of(student, tmp_path, teacher_model_kind="ema", teacher_update_rate=0.001)
    name, _, weights = next(teacher._weight_pairs())
    start = weights.detach().clone()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    for step in range(1, 101):
        teacher.begin_step(step)
    moved = (teacher.state_dict()["weights"][name] - start.float()).mean().item()
    assert moved == pytest.approx(1 - 0.999**100, rel=1e-2)
    assert teacher.state_dict()["weights"][name].dtype == torch.float32
    assert (weights.float() - start.float()).mean().item() == pytest.approx(moved, rel=0.05)


def test_the_teachers_dtype_is_the_students_unless_told(tmp_path):
    """`teacher_model_init_kwargs` is where it is told."""
    assert teacher_of(tiny_model(), tmp_path)._model.dtype == torch.float32
    told = teacher_of(tiny_model(), tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})
    assert told._model.dtype == torch.bfloat16


def test_the_copy_is_of_the_live_student(tmp_path):
    """Not of what its id names: weights changed before construction are in it."""
    student = tiny_model()
    perturb(student, seed=5)
    teacher = teacher_of(student, tmp_path)
    assert torch.equal(served_logits(teacher), logits(student))
    assert not torch.allclose(logits(student), logits(tiny_model()))
    assert not any(parameter.requires_grad for parameter in teacher._model.parameters())


def test_base_cannot_be_refreshed(tmp_path):
    """Its weights are those of step 0."""
    with pytest.raises(ValueError, match="weights of step 0"):
        teacher_of(tiny_model(), tmp_path, teacher_model_kind="base").refresh()


@pytest.mark.parametrize("kind", ["periodic", "live"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_pass_leaves_the_student_as_it_was(tmp_path, tuning, kind):
    """Training mode of each module, active adapter, requires_grad; also when the pass fails."""
    student = lora_model(lora_dropout=0.1) if tuning == "lora" else tiny_model()
    teacher = teacher_of(student, tmp_path, teacher_model_kind=kind)
    student.train()
    next(student.children()).eval()  # one part that a user froze in evaluation mode

    def state():
        modes = {name: module.training for name, module in student.named_modules()}
        grads = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
        active = {n: m.active_adapters for n, m in student.named_modules() if hasattr(m, "active_adapters")}
        return modes, grads, active, parameters_of(student).keys()

    before, weights = state(), parameters_of(student)
    with torch.no_grad(), teacher.serving() as model:
        assert not any(module.training for module in model.modules())
        logits(model)
    assert state() == before
    with pytest.raises(KeyError), teacher.serving():
        raise KeyError
    assert state() == before
    assert all(torch.equal(weights[name], value) for name, value in parameters_of(student).items())


def test_with_lora_dropout_the_shared_teacher_equals_a_separate_copy_in_eval_mode(tmp_path):
    """Dropout stays the student's."""
    student = lora_model(lora_dropout=0.1)
    separate = copy.deepcopy(student).eval()
    teacher = teacher_of(student, tmp_path)
    student.train()
    torch.testing.assert_close(served_logits(teacher), logits(separate), rtol=1e-6, atol=1e-6)
    assert not torch.equal(logits(student), logits(student))


def test_gradient_checkpointing_recomputes_with_the_students_adapter(tmp_path):
    """Gradients with a teacher's pass between forward and backward equal those without checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        student = lora_model()
        teacher = teacher_of(student, tmp_path)
        perturb(student, seed=3)  # so that the adapters differ
        student.train()
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
            student.enable_input_require_grads()
        out = student(input_ids=torch.arange(12).view(2, 6)).logits.logsumexp(-1).sum()
        served_logits(teacher)
        out.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_base_with_an_adapter_that_is_no_identity(tmp_path):
    """The teacher is base model plus adapter of step 0, not the bare base model."""
    student = lora_model()
    start = logits(student)
    teacher = teacher_of(student, tmp_path, teacher_model_kind="base")
    for step in range(1, 4):
        teacher.begin_step(step)
        perturb(student, seed=step)
    torch.testing.assert_close(served_logits(teacher), start)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian"])
def test_initialisations_that_change_the_base_model_change_it_once(tmp_path, init):
    """The second adapter must not subtract itself from the base weights again."""
    student = get_peft_model(tiny_model(), lora(init_lora_weights=init))
    start, base = logits(student), student.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    teacher = teacher_of(student, tmp_path)
    assert torch.equal(student.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, base)
    torch.testing.assert_close(served_logits(teacher), start)
    torch.testing.assert_close(logits(student), start)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_lora_variants_are_shared_exactly(tmp_path, variant):
    """DoRA's magnitudes, rank-stabilised scaling and ranks by layer are the student's."""
    student = lora_model(**variant)
    start = logits(student)
    teacher = teacher_of(student, tmp_path)
    perturb(student, seed=1)
    torch.testing.assert_close(served_logits(teacher), start, rtol=1e-5, atol=1e-5)
    teacher.refresh()
    torch.testing.assert_close(served_logits(teacher), logits(student), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices"),
    ],
)
def test_adapters_that_cannot_be_shared_are_refused(tmp_path, overrides, message):
    """Anything but pure LoRA would change the teacher with the student."""
    model = get_peft_model(tiny_model(), lora(**overrides))
    with pytest.raises(ValueError, match=message):
        teacher_of(model, tmp_path)


def test_lora_on_the_head_is_refused(tmp_path):
    """TRL's own check, which the loss relies on: it reads the head's base weight."""
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))


def test_several_active_adapters_and_the_reserved_name_are_refused(tmp_path):
    """One student, and the name of the teacher's adapter is taken."""
    model = get_peft_model(tiny_model(), lora(), adapter_name="teacher")
    with pytest.raises(ValueError, match="called 'teacher'"):
        teacher_of(model, tmp_path)
    model = lora_model()
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 active adapters"):
        teacher_of(model, tmp_path)


def test_another_adapter_type_is_refused(tmp_path):
    """Only LoRA layers hold two adapters side by side as the teacher needs them."""
    from peft import IA3Config

    model = get_peft_model(
        tiny_model(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(ValueError, match="LoRA adapters only"):
        teacher_of(model, tmp_path)


def test_making_the_teacher_twice_is_idempotent(tmp_path):
    """A second trainer on the same model takes the student's weights over again."""
    student = lora_model()
    teacher_of(student, tmp_path)
    perturb(student, seed=1)
    again = teacher_of(student, tmp_path)
    torch.testing.assert_close(served_logits(again), logits(student))


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["periodic", "ema", "base", "live"])
def test_a_restored_teacher_answers_and_continues_the_same(tmp_path, tuning, kind):
    """Restored onto a fresh teacher it answers the same and goes on the same."""
    fields = KINDS[kind]
    first = lora_model() if tuning == "lora" else tiny_model()
    teacher = teacher_of(first, tmp_path, **fields)
    for step in range(1, 6):
        teacher.begin_step(step)
        perturb(first, seed=step)
    second = copy.deepcopy(first)
    restored = teacher_of(second, tmp_path, **fields)
    restored.load_state_dict(teacher.state_dict())
    assert (restored.age_steps, restored.refreshes) == (teacher.age_steps, teacher.refreshes)
    for step in range(6, 9):
        for each in (teacher, restored):
            each.begin_step(step)
            perturb(each.student, seed=step)
        assert torch.equal(served_logits(teacher), served_logits(restored))
        assert (teacher.age_steps, teacher.refreshes) == (restored.age_steps, restored.refreshes)


def test_state_of_another_teacher_is_refused(tmp_path):
    """By kind and by model."""
    state = teacher_of(tiny_model(), tmp_path).state_dict()
    with pytest.raises(ValueError, match="teacher_model_kind='periodic'"):
        teacher_of(tiny_model(), tmp_path, teacher_model_kind="base").load_state_dict(state)
    with pytest.raises(ValueError, match="another model"):
        teacher_of(tiny_model(num_hidden_layers=1), tmp_path).load_state_dict(state)


def test_the_teachers_adapter_is_in_no_optimizer_and_no_saved_model(tmp_path):
    """After training: parameter groups, trainable flags, the final directory, and a reload without it."""
    trainer = make_trainer(tmp_path, dataset=rows(), peft_config=lora(), learning_rate=1e-2)
    trainer.train()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if "teacher" in name:
            assert id(parameter) not in optimized
            assert not parameter.requires_grad
        assert (id(parameter) in optimized) == ("lora_" in name and "teacher" not in name)
    trainer.save_model(str(tmp_path / "final"))
    trainer.model.save_pretrained(tmp_path / "by_hand")
    for directory in ("final", "by_hand"):
        saved = [path.relative_to(tmp_path) for path in (tmp_path / directory).rglob("*")]
        assert not any("teacher" in str(path) for path in saved), saved
        names = load_file(tmp_path / directory / "adapter_model.safetensors").keys()
        assert len(names) == sum("lora_" in n and "teacher" not in n for n, _ in trainer.model.named_parameters()), (
            names
        )
        reloaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / directory))
        assert not any("teacher" in name for name, _ in reloaded.named_parameters())
        torch.testing.assert_close(logits(reloaded), logits(trainer.model.eval()))


def test_the_base_model_is_unchanged_after_20_lora_steps(tmp_path):
    """Bit for bit, and the adapter did move."""
    trainer = make_trainer(
        tmp_path, peft_config=lora(lora_dropout=0.1), max_steps=20, teacher_sync_steps=4, learning_rate=1e-2, bf16=True
    )
    before = parameters_of(trainer.model)
    trainer.train()
    for name, value in parameters_of(trainer.model).items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    assert trainer.teacher.refreshes == 5


def test_settings_without_effect_on_a_shared_teacher_warn(tmp_path):
    """A dtype, and a place, for a copy that is not made."""
    with pytest.warns(UserWarning, match="teacher_model_init_kwargs has no effect with LoRA"):
        teacher_of(lora_model(), tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})
    with pytest.warns(UserWarning, match="teacher_offload has no effect with LoRA"):
        teacher_of(lora_model(), tmp_path, teacher_offload=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_fsdp_version_1_is_refused_for_every_teacher(tmp_path, kind, is_lora):
    student = lora_model() if is_lora else tiny_model()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None))
    with pytest.raises(ValueError, match=r"fsdp_version: 2.*fsdp2\.yaml"):
        make_teacher(student, config(tmp_path, **KINDS[kind]), accelerator)


def test_made_up_rollouts_are_what_they_say():
    """The helper other tests rely on: padding, order and masks."""
    batch, plain = made_up_rollouts(50, [3, 1], masked={0: [1]})
    assert batch["completion_ids"][0].tolist() == plain["completions"][0]
    assert batch["completion_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (batch["completion_mask"] * batch["tool_mask"]).tolist() == [[1, 0, 1], [1, 0, 0]]
    assert batch["prompt_ids"][0].tolist()[-3:] == plain["students"][0]


def test_the_gate_postpones_a_due_refresh_until_the_next_one(tmp_path):
    teacher = teacher_of(tiny_model(), tmp_path, **KINDS["periodic"])
    asked = []

    def allow_from_step_6(step: int) -> bool:
        asked.append(step)
        return step >= 6

    teacher.refresh_gate = allow_from_step_6
    counts = []
    for step in range(1, 8):
        teacher.begin_step(step)
        counts.append((teacher.refreshes, teacher.postponed, teacher.age_steps))
    assert asked == [3, 6]
    assert counts == [(0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 4), (1, 1, 0), (1, 1, 1)]
    restored = teacher_of(tiny_model(), tmp_path, **KINDS["periodic"])
    restored.load_state_dict(teacher.state_dict())
    assert (restored.refreshes, restored.postponed) == (1, 1)


def test_the_averages_of_a_bfloat16_adapter_survive_a_checkpoint(tmp_path):
    model = lora_model().to(torch.bfloat16)
    teacher = teacher_of(model, tmp_path, **KINDS["ema"])
    perturb(model, 1)
    teacher.refresh()
    averages = {name: average.clone() for name, average in teacher.state_dict()["weights"].items()}
    assert all(average.dtype == torch.float32 for average in averages.values())
    # The test says nothing if rounding loses nothing
    assert any(not torch.equal(average, average.bfloat16().float()) for average in averages.values())
    teacher.save(tmp_path)
    restored = teacher_of(lora_model(1).to(torch.bfloat16), tmp_path, **KINDS["ema"])
    restored.load(tmp_path)
    loaded = restored.state_dict()["weights"]
    assert averages.keys() == loaded.keys()
    assert all(torch.equal(average, loaded[name]) for name, average in averages.items())


def test_the_teachers_adapter_has_the_scale_that_the_students_was_given(tmp_path):
    from peft.tuners.lora import LoraLayer

    model = lora_model()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.25)
    expected = logits(model)
    torch.testing.assert_close(
        served_logits(teacher_of(model, tmp_path, **KINDS["periodic"])), expected, rtol=0, atol=0
    )
