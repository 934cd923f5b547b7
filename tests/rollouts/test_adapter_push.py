"""What vLLM receives of a LoRA student: over many pushes in bfloat16, of each kind of adapter, after a resume; what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.helpers import make_trainer, parameters_of
from tests.models.test_adapter_checks import MOE, SHARED, TARGETS, perturb
from tests.receiving_engine import engine_like, receiving
from tests.tiny_architectures import tiny_architecture
from tests.tiny_models import tiny_model, tiny_tokenizer
from trl_crisp.rollouts.adapter_push import check_pushable, merged_parameters

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")

CPU = torch.device("cpu")
GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}


def architecture(kind: str):
    """A model of a kind with the vocabulary of the tests' tokenizer."""
    tokenizer = tiny_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return tiny_architecture(kind, vocab_size=len(tokenizer), **ids)


# The base model, the fields of the adapter, and how many pushes
KINDS = {
    **{
        name: (tiny_model, SHARED[name], 50)
        for name in ("plain", "rslora", "dora", "ranks_and_alphas", "embedding", "dropout")
    },
    "tied": (lambda: tiny_model("gemma"), {}, 50),
    "qwen3": (lambda: tiny_model("qwen3"), {"target_modules": "all-linear"}, 50),
    **{
        name: (tiny_model, fields, 3)
        for name, fields in SHARED.items()
        if name not in ("plain", "rslora", "dora", "ranks_and_alphas", "embedding", "dropout", "lora_bias")
    },
    "dora-embedding": (tiny_model, {"use_dora": True, "target_modules": ["embed_tokens"]}, 3),
    **{
        f"{kind}-{name}": (lambda kind=kind: architecture(kind), fields, 3)
        for kind in ("qwen3_moe", "mixtral")
        for name, fields in MOE.items()
    },
    "conv1d": (lambda: architecture("gpt2"), GPT2, 3),
    "conv1d-bias": (lambda: architecture("gpt2"), {**GPT2, "lora_bias": True}, 3),
    "conv1d-dora": (lambda: architecture("gpt2"), {**GPT2, "use_dora": True}, 3),
}


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **fields})


def merged_in_float64(model: PeftModel) -> dict[str, torch.Tensor]:
    """The formulas of LoRA, rsLoRA and DoRA where the layer is one of them, else PEFT's merge; all in float64."""
    exact = copy.deepcopy(model).double()
    layers = [layer for layer in exact.modules() if isinstance(getattr(layer, "scaling", None), dict)]
    config = exact.peft_config["default"]
    plain = exact.merge_and_unload(adapter_names=["default"])
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    merged = dict(plain.named_parameters())
    if config.use_bdlora or config.fan_in_fan_out or config.target_parameters:
        return merged
    originals = dict(model.get_base_model().named_parameters())
    for layer in layers:
        if "default" not in layer.lora_A or layer.__class__.__name__ != "Linear":
            continue
        name = names[id(layer.get_base_layer().weight)]
        rank, alpha = layer.r["default"], layer.lora_alpha["default"]
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        weight = originals[name.replace(".weight", ".base_layer.weight")].double()
        weight = weight + scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if config.use_dora:
            weight = weight * (layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1))[:, None]
        merged[name] = weight
    return merged


def assert_rounded_once(received: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Each value is within half a unit in the last place of bfloat16, which has 8 bits, and float32's rounding of the sum."""
    assert received.keys() == exact.keys()
    for name, tensor in received.items():
        assert tensor.dtype == torch.bfloat16
        half_ulp = torch.ldexp(torch.ones_like(exact[name]), torch.frexp(exact[name]).exponent - 9)
        error = (tensor.double() - exact[name]).abs()
        assert (error <= half_ulp + 2**-22 * exact[name].abs().max()).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_pushes_never_touch_the_base_and_are_rounded_once(tmp_path, monkeypatch, kind):
    """Names, values and prefix cache, colocated and to a server in turns of kinds; the teacher's adapter stays at home."""
    make_base, fields, pushes = KINDS[kind]
    model = make_base().to(torch.bfloat16)
    mode = "server" if list(KINDS).index(kind) % 2 else "colocate"
    names = [name for name, _ in model.named_parameters()]
    with receiving(engine_like(model), monkeypatch) as engine:
        trainer = make_trainer(
            tmp_path, model=model, peft_config=lora(**fields), use_vllm=True, vllm_mode=mode, max_prompt_length=300
        )
    student = trainer.model
    frozen = {name: w for name, w in parameters_of(student).items() if ".default" not in name}
    assert any(".teacher." in name for name in frozen)
    for push in range(pushes):
        perturb(student, seed=push)
        trainer.vllm_generation.sync_weights()
        if push in (0, 1, pushes - 1):
            received = engine.pushes[-1]
            # PEFT's passes over experts move their parameters to the end of a module
            assert sorted(received) == sorted(names)
            assert_rounded_once(received, merged_in_float64(student))
    assert engine.resets == len(engine.pushes) == pushes
    after = parameters_of(student)
    assert all(torch.equal(after[name], weight) for name, weight in frozen.items())
    assert any(not torch.equal(engine.pushes[0][name], engine.pushes[-1][name]) for name in names)
    assert not any(module.merged for module in student.modules() if hasattr(module, "merged_adapters"))


def test_trls_own_push_lets_a_bfloat16_base_drift():
    """The reason for all this; if it fails, TRL may have mended it."""
    model = get_peft_model(tiny_model().to(torch.bfloat16), lora())
    before = parameters_of(model.get_base_model())
    for push in range(5):
        perturb(model, seed=push)
        model.merge_adapter()
        model.unmerge_adapter()
    name = "model.layers.0.self_attn.q_proj.base_layer.weight"
    assert not torch.equal(parameters_of(model.get_base_model())[name], before[name])


@pytest.mark.parametrize("teacher", ["periodic", "base", "ema", "live"])
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_run_samples_from_the_student_and_keeps_its_base(tmp_path, monkeypatch, mode, teacher):
    model = tiny_model().to(torch.bfloat16)
    before = parameters_of(model)
    with receiving(engine_like(model), monkeypatch) as engine:
        trainer = make_trainer(
            tmp_path,
            model=model,
            peft_config=lora(),
            use_vllm=True,
            vllm_mode=mode,
            teacher_model_kind=teacher,
            teacher_sync_steps=2 if teacher in ("periodic", "ema") else None,
            learning_rate=1e-2,
        )
        trainer.train()
    assert engine.resets == 3
    after = {name.replace(".base_layer", ""): w for name, w in parameters_of(trainer.model.get_base_model()).items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    gaps = [log["vllm/mean_gap_nats"] for log in trainer.state.log_history if "vllm/mean_gap_nats" in log]
    assert len(gaps) == 3
    # The student computes with base and adapter apart, the engine with their sum in bfloat16
    assert max(gaps) < 0.1


def test_after_a_resume_the_adapter_is_counted_once(tmp_path, monkeypatch):
    base = tiny_model().to(torch.bfloat16)
    settings = {
        "peft_config": lora(),
        "use_vllm": True,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    engines = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = copy.deepcopy(base)
        with receiving(engine_like(model), monkeypatch) as engine:
            trainer = make_trainer(tmp_path, model=model, **settings)
            engine.seed = 0 if checkpoint is None else 2
            trainer.train(resume_from_checkpoint=checkpoint)
        engines.append(engine)
    whole, resumed = engines
    assert (len(whole.pushes), len(resumed.pushes)) == (4, 2)
    for earlier, later in zip(whole.pushes[2:], resumed.pushes, strict=True):
        assert all(torch.equal(later[name], weight) for name, weight in earlier.items())


def test_a_second_run_in_the_same_process_begins_with_a_push(tmp_path, monkeypatch):
    """It begins at step 0, where the first one pushed last."""
    model = tiny_model()
    with receiving(engine_like(model), monkeypatch) as engine:
        trainer = make_trainer(
            tmp_path, model=model, peft_config=lora(), use_vllm=True, max_steps=1, learning_rate=1e-2
        )
        trainer.train()
        trained = dict(merged_parameters(trainer.model, CPU))
        trainer.train()
    assert len(engine.pushes) == 2
    assert all(torch.equal(engine.pushes[1][name], weight) for name, weight in trained.items())


def test_only_the_students_adapter_is_merged(tmp_path):
    """Not one that is inactive, also not on layers that the student's leaves alone."""
    model = get_peft_model(tiny_model(), lora())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    perturb(model, seed=0)
    received = dict(merged_parameters(model, CPU))
    base = model.get_base_model().model.layers[0].self_attn
    assert torch.equal(received["model.layers.0.self_attn.v_proj.weight"], base.v_proj.base_layer.weight)
    expected = base.q_proj.base_layer.weight + base.q_proj.get_delta_weight("default")
    torch.testing.assert_close(received["model.layers.0.self_attn.q_proj.weight"], expected)


def test_names_are_without_wrappers():
    model = get_peft_model(tiny_model(), lora())
    expected = list(dict(merged_parameters(model, CPU)))
    body = model.base_model.model.model
    body.layers[0] = torch.compile(body.layers[0])
    assert list(dict(merged_parameters(model, CPU))) == expected


# Refused


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        ("gemma", {"target_modules": ["embed_tokens"]}, r"model\.embed_tokens\.weight, lm_head\.weight.*untie"),
        ("llama", {"lora_bias": True}, r"adds a bias to model\.layers\.0\.self_attn\.q_proj.*lora_bias=False"),
    ],
)
def test_what_vllm_has_no_parameter_for_is_refused(tmp_path, monkeypatch, kind, fields, match):
    model = tiny_model(kind)
    with receiving(engine_like(model), monkeypatch), pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, kind, model=model, peft_config=lora(**fields), use_vllm=True)


def test_a_quantized_base_is_refused():
    model = get_peft_model(tiny_model(), lora())
    check_pushable(model)
    # As transformers leaves it on a model that it loaded with a quantization_config; none of the quantizers runs here
    model.get_base_model().hf_quantizer = SimpleNamespace()
    with pytest.raises(ValueError, match=r"base model is quantized.*without quantization"):
        check_pushable(model)


def test_a_merged_adapter_is_not_counted_twice():
    model = get_peft_model(tiny_model(), lora())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"merged into the base model at model\.layers.*unmerge_adapter"):
        list(merged_parameters(model, CPU))
