"""Which adapters are shared, each field of LoRA's config against a separate copy, and which are refused before training."""

import copy
import dataclasses

import peft
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, EvaConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tests.helpers import config, make_trainer, parameters_of
from tests.tiny_architectures import tiny_architecture
from tests.tiny_models import tiny_model, tiny_tokenizer
from trl_crisp.models.adapter_checks import _DESCRIPTIVE_FIELDS, _SHAREABLE_FIELDS, _WHY_NOT_SHAREABLE
from trl_crisp.teacher import make_teacher

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")

TARGETS = ["q_proj", "down_proj"]
SHARED = {
    "plain": {},
    "all_but_some": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "some_layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "ranks_and_alphas": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "bdlora": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    },
    "velora": {"velora_config": VeloraConfig()},
    "dropout": {"lora_dropout": 0.2},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    **{str(init): {"init_lora_weights": init} for init in (False, "gaussian", "orthogonal", "pissa_niter_4", "mica")},
}
MOE = {
    "all_linear": {"target_modules": "all-linear"},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "router": {"target_modules": ["gate", "q_proj"]},
}


def lora_model(model, **fields) -> PeftModel:
    """A LoRA model whose adapter has been trained already: it is no identity."""
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **fields})).eval()
    perturb(model, seed=0)
    return model


def perturb(model, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).view(2, 6)).logits


def check_shared_as_a_separate_copy(student, tmp_path) -> None:
    """At the start, once the student has moved, and once it is refreshed; the student's own answers never change by it."""
    separate = copy.deepcopy(student)
    start = logits(student)
    teacher = make_teacher(student, config(tmp_path), Accelerator(cpu=True))

    def served():
        with teacher.serving() as model:
            return logits(model)

    assert torch.equal(logits(student), start)
    assert torch.equal(served(), logits(separate))
    perturb(student, seed=1)
    perturb(separate, seed=1)
    assert torch.equal(served(), start)
    assert torch.equal(logits(student), logits(separate))
    assert not torch.allclose(logits(student), start, atol=1e-2)
    teacher.refresh()
    assert torch.equal(served(), logits(separate))
    assert not any(p.requires_grad for n, p in student.named_parameters() if "teacher" in n.split("."))


@pytest.mark.parametrize("fields", SHARED.values(), ids=SHARED)
def test_the_shared_teacher_equals_a_separate_copy(tmp_path, fields):
    check_shared_as_a_separate_copy(lora_model(tiny_model(), **fields), tmp_path)


@pytest.mark.parametrize("fields", MOE.values(), ids=MOE)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_adapters_on_experts_are_shared(tmp_path, kind, fields):
    """PEFT turns "all-linear" on such models into target_parameters by itself."""
    check_shared_as_a_separate_copy(lora_model(tiny_architecture(kind), **fields), tmp_path)


def test_conv1d_layers_are_shared(tmp_path):
    """GPT-2's weights are transposed (fan_in_fan_out)."""
    check_shared_as_a_separate_copy(
        lora_model(tiny_architecture("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True), tmp_path
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_training_adapters_on_experts_leaves_the_base_model_alone(tmp_path, kind):
    """With checkpointing, over refreshes; saved and loaded, the model answers the same."""
    tokenizer = tiny_tokenizer()
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    fields |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    trainer = make_trainer(
        tmp_path,
        model=tiny_architecture(kind, **fields),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        gradient_checkpointing=True,
        max_steps=4,
        teacher_sync_steps=2,
        learning_rate=1e-2,
    )
    before = parameters_of(trainer.model)
    trainer.train()
    moved = {name for name, value in parameters_of(trainer.model).items() if not torch.equal(value, before[name])}
    assert any("experts" in name for name in moved)
    assert all("lora_" in name for name in moved)
    trainer.save_model(str(tmp_path / "final"))
    reloaded = PeftModel.from_pretrained(tiny_architecture(kind, **fields), str(tmp_path / "final"))
    torch.testing.assert_close(logits(reloaded), logits(trainer.model.eval()))


REFUSED = {
    "alora_invocation_tokens": [3, 4],
    "arrow_config": ArrowConfig(),
    "bias": "lora_only",
    "ensure_weight_tying": True,
    "kasa_config": KasaConfig(),
    "layer_replication": [(0, 2), (1, 2)],
    "megatron_config": {"hidden_size": 32},
    "modules_to_save": ["embed_tokens"],
    "monteclora_config": MontecloraConfig(),
    "trainable_token_indices": {"embed_tokens": [1, 2]},
}


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_fields_that_cannot_be_shared_are_refused(tmp_path, field, value):
    """By name, before a model gets such an adapter."""
    with pytest.raises(ValueError, match=f"LoRA config's {field}=.*Remove {field}"):
        make_trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules=TARGETS, **{field: value}))


def test_every_field_of_the_config_is_decided():
    """A field that PEFT adds is refused if it is set, until it is tried."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == _SHAREABLE_FIELDS | _DESCRIPTIVE_FIELDS | set(_WHY_NOT_SHAREABLE)
    assert set(REFUSED) == set(_WHY_NOT_SHAREABLE)


def test_a_field_that_is_not_known_is_refused(tmp_path):
    @dataclasses.dataclass
    class NewConfig(LoraConfig):
        use_what_comes_next: bool = False

    fields = {"r": 4, "target_modules": TARGETS}
    make_trainer(tmp_path, peft_config=NewConfig(**fields))
    with pytest.raises(ValueError, match="use_what_comes_next=True is not known"):
        make_trainer(tmp_path, peft_config=NewConfig(**fields, use_what_comes_next=True))


OTHERS = {
    "AdaLoraConfig": {"total_step": 10},
    "BOFTConfig": {},
    "C3AConfig": {"block_size": 16},
    "FourierFTConfig": {},
    "HRAConfig": {},
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "MissConfig": {"r": 4},
    "OFTConfig": {},
    "PrefixTuningConfig": {"num_virtual_tokens": 4, "target_modules": None},
    "PromptEncoderConfig": {"num_virtual_tokens": 4, "target_modules": None},
    "PromptTuningConfig": {"num_virtual_tokens": 4, "target_modules": None},
    "RandLoraConfig": {},
    "RoadConfig": {"group_size": 16},
    "ShiraConfig": {"r": 4},
    "TrainableTokensConfig": {"token_indices": [1], "target_modules": ["embed_tokens"]},
    "VBLoRAConfig": {"vector_length": 16, "num_vectors": 8},
    "VeraConfig": {},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("given", ["config", "model"])
def test_other_kinds_of_adapter_are_refused(tmp_path, name, given):
    """As a config, and as a model that has one."""
    fields = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **OTHERS[name]}
    adapter = getattr(peft, name)(**{key: value for key, value in fields.items() if value is not None})
    model = tiny_model(vocab_size=272)
    given_as = (
        {"model": model, "peft_config": adapter} if given == "config" else {"model": get_peft_model(model, adapter)}
    )
    with pytest.raises(ValueError, match="LoRA adapters only"):
        make_trainer(tmp_path, **given_as)


def test_weights_trained_beside_the_adapter_are_refused(tmp_path):
    """The teacher reads them, too."""
    model = lora_model(tiny_model())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters of the base model .*norm\.weight"):
        make_trainer(tmp_path, model=model)


def test_an_active_adapter_that_is_frozen_is_refused(tmp_path):
    """Another, inactive one that is trainable does not help."""
    model = lora_model(tiny_model())
    model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    with pytest.raises(ValueError, match="active adapter 'default' is trainable"):
        make_trainer(tmp_path, model=model)
