"""What we rely on in TRL, transformers, PEFT and accelerate without being promised it: one test for each contract.

A failure here after an upgrade says what changed upstream and which code of ours has to follow.
"""

import inspect
import json
import math
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import Trainer, TrainerState
from trl import DistillationConfig, DistillationTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import _ForwardRedirection

from tests.helpers import make_trainer, rows
from tests.receiving_engine import engine_like, receiving
from tests.tiny_models import tiny_llama, tiny_tokenizer
from trl_crisp import CRISPTrainer, _upstream
from trl_crisp.loss.divergence import _logit_scale
from trl_crisp.run.resumable import ResumableTrainer

# Member, its parameters, who of ours relies on them
SIGNATURES = [
    (
        DistillationTrainer.__init__,
        "self model teacher_model args train_dataset eval_dataset processing_class callbacks optimizers "
        "quantization_config peft_config tools",
        "trainer.py passes all but teacher_model by keyword",
    ),
    (
        DistillationTrainer.compute_loss,
        "self model inputs return_outputs num_items_in_batch",
        "trainer.py overrides it",
    ),
    (DistillationTrainer._compute_loss, "self unwrapped_student inputs num_items_in_batch", "trainer.py replaces it"),
    (DistillationTrainer._generate_and_score_completions, "self inputs", "trainer.py extends it"),
    (DistillationTrainer._prepare_inputs, "self generation_batch", "trainer.py extends it"),
    (DistillationTrainer._tokenize_prompts, "self prompts", "trainer.py tokenizes the teacher's prompts with it"),
    (
        DistillationTrainer._get_last_hidden_state,
        "self unwrapped_model input_ids attention_mask logits_to_keep pixel_values image_grid_thw pixel_attention_mask "
        "spatial_shapes image_sizes token_type_ids mm_token_type_ids image_position_ids",
        "trainer.py passes the first four by position and no vision input",
    ),
    (VLLMGeneration._iter_named_params, "self", "rollouts/adapter_push.py puts its own in place of it"),
    (
        VLLMGeneration.sync_weights,
        "self",
        "rollouts/adapter_push.py relies on it to read the weights, reset the cache",
    ),
    (
        VLLMGeneration.generate,
        "self prompts images num_generations profiler",
        "rollouts/engine_check.py wraps it, and sets `logprobs`",
    ),
    (_ForwardRedirection.__call__, "self wrapper_module original_module method args kwargs", "trainer.py calls it"),
    (Trainer._save_optimizer_and_scheduler, "self output_dir", "trainer.py saves the teacher in it"),
    (Trainer._load_optimizer_and_scheduler, "self checkpoint", "trainer.py loads the teacher in it"),
    (Trainer._load_best_model, "self", "run/resumable.py notes the step whose weights were loaded"),
    (DistillationTrainer.create_model_card, "self model_name dataset_name tags", "publish/publishing.py replaces it"),
    (Trainer.save_model, "self output_dir _internal_call", "publish/publishing.py extends it"),
    (
        Trainer.push_to_hub,
        "self commit_message blocking token revision private kwargs",
        "publish/publishing.py replaces it",
    ),
    (Trainer.init_hf_repo, "self token private", "publish/publishing.py makes the repository with it"),
    (Trainer._finish_current_push, "self", "publish/publishing.py waits for a checkpoint's push with it"),
]


@pytest.mark.parametrize(("member", "parameters", "user"), SIGNATURES, ids=[row[0].__qualname__ for row in SIGNATURES])
def test_methods_that_we_call_or_override_have_the_known_parameters(member, parameters, user):
    now = list(inspect.signature(inspect.unwrap(member)).parameters)
    assert now == parameters.split(), f"{member.__qualname__} has other parameters now; {user}"


# By the names that _upstream.py hands on: the signature, and who of ours relies on it
UPSTREAM = {
    "ChunkedDivergenceFunction": (
        "student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta temperature "
        "student_logit_scale student_final_logit_softcapping teacher_logit_scale teacher_final_logit_softcapping",
        "loss/divergence.py passes all by position",
    ),
    "maybe_gather_lm_head_ctx": ("params", "model_checks.py passes the head's weight and bias by position"),
    "pad": ("tensors padding_value padding_side pad_to_multiple_of", "trainer.py pads the teacher's prompts"),
    "get_comet_experiment_url": ("", "publish/run_card.py links the tracker with it"),
    "get_trackio_space_url": ("", "publish/run_card.py links the tracker with it"),
    "prepare_deepspeed": ("model accelerator", "teacher.py"),
    "prepare_fsdp": ("model accelerator", "teacher.py"),
    "unwrap_model_for_generation": (
        "model accelerator gather_deepspeed3_params generation_kwargs gradient_checkpointing_kwargs",
        "health/measuring.py passes the first two by position",
    ),
}


@pytest.mark.parametrize("name", _upstream.__all__)
def test_names_in_upstream_have_the_known_parameters(name):
    assert name in UPSTREAM, f"_upstream.py hands on {name}; write down here what we rely on"
    parameters, user = UPSTREAM[name]
    member = getattr(_upstream, name)
    now = list(inspect.signature(getattr(member, "forward", member)).parameters)
    assert [parameter for parameter in now if parameter != "ctx"] == parameters.split(), (
        f"TRL's {name} has other parameters now; {user}"
    )


def test_what_we_override_is_still_there():
    """A member that upstream renamed would leave ours as dead code that nothing calls."""
    private = {
        name
        for cls in (CRISPTrainer, ResumableTrainer)
        for name in vars(cls)
        if name.startswith("_") and not name.startswith("__")
    }
    ours = {
        "_check_learning_rate",
        "_select_rows",
        "_tokenize_without_turn",
        "_record_rollouts",
        "_record_texts",
        "_check_teacher_is_not_uniform",
        "_judge_engine",
        "_make_engine_check",
        "_describe_failed_save",
        "_from_main_process",
    }
    overridden = {name for name in private if hasattr(DistillationTrainer, name)}
    assert {
        "_compute_loss",
        "_generate_and_score_completions",
        "_prepare_inputs",
        "_get_train_sampler",
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
        "_save_rng_state",
        "_load_optimizer_and_scheduler",
        "_init_training_state",
        "_finalize_training",
        "_run_epoch",
    } <= overridden, "DistillationTrainer lost a member that CRISPTrainer overrides"
    assert ours <= private
    assert not ours & set(dir(DistillationTrainer)), "DistillationTrainer now has a member of a name of ours"


def test_attributes_that_the_trainer_reads(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    for name in (
        "_forward_redirection",
        "_metrics",
        "_step",
        "_tokenizer",
        "_is_vlm",
        "accelerator",
        "chat_template",
        "chat_template_kwargs",
        "pad_to_multiple_of",
        "processing_class",
        "tools",
        "is_deepspeed_enabled",
        "is_fsdp_enabled",
    ):
        assert hasattr(trainer, name), f"DistillationTrainer has no {name} now; trainer.py reads it"


# The loss


@pytest.mark.parametrize(("count", "works"), [(2, False), (3, True), (4, False)])
def test_compute_loss_unpacks_exactly_three_values(tmp_path, monkeypatch, count, works):
    """Hence the diagnostics of CRISPTrainer._compute_loss travel on the trainer, not in its result."""
    trainer = make_trainer(tmp_path)
    values = (torch.tensor(1.5), torch.tensor(8.0), torch.tensor(4), torch.tensor(0))[:count]
    monkeypatch.setattr(trainer, "_compute_loss", lambda *_: values)
    if works:
        assert DistillationTrainer.compute_loss(trainer, trainer.model, {}) == 1.5
        mode = "train" if trainer.model.training else "eval"
        assert trainer._metrics[mode]["entropy"] == [2.0], "the second and third are entropy's sum and token count"
    else:
        with pytest.raises(ValueError, match="unpack"):
            DistillationTrainer.compute_loss(trainer, trainer.model, {})


@pytest.mark.parametrize(("given", "processes", "passed"), [(12, 1, 12.0), (12, 4, 3.0), (0, 1, 1.0), (0, 4, 0.25)])
def test_num_items_in_batch_is_clamped_and_divided_by_the_processes(tmp_path, monkeypatch, given, processes, passed):
    """loss/weighting.py divides by what comes out, which is right because gradients are averaged over processes."""
    trainer = make_trainer(tmp_path)
    seen = []

    def compute(student, inputs, num_items_in_batch):
        seen.append(num_items_in_batch)
        return torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1)

    monkeypatch.setattr(trainer, "_compute_loss", compute)
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    trainer.model.train()
    inputs = {"num_items_in_batch": torch.tensor(given)}
    DistillationTrainer.compute_loss(trainer, trainer.model, inputs, num_items_in_batch=torch.tensor(999))
    assert seen[-1].item() == passed, "trainer.py's num_items_in_batch reaches the loss otherwise"
    trainer.model.eval()
    DistillationTrainer.compute_loss(trainer, trainer.model, inputs)
    assert seen[-1] is None, "in evaluation trainer.py expects None and counts the micro-batch itself"


def test_the_trainer_does_not_divide_the_loss_by_the_accumulation_steps(tmp_path):
    """`loss_is_scaled_for_ga`: our loss is divided by the count of the whole optimizer step already."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parameter = trainer.model.get_output_embeddings().weight
    trainer._prepare_inputs = lambda batch: batch
    trainer.compute_loss = lambda model, inputs, num_items_in_batch=None, **_: 3.0 * parameter.sum()
    trainer.current_gradient_accumulation_steps = 4
    trainer.create_optimizer()
    loss = trainer.training_step(trainer.model, {}, num_items_in_batch=None)
    assert loss.item() == pytest.approx(3.0 * parameter.sum().item(), rel=1e-5)
    assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0)), (
        "the gradient was divided by the 4 micro-batches"
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_kernels_argument_order_and_two_outputs(beta):
    """Every argument differs, so that two that changed places are seen; loss/divergence.py passes them by position."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    student, teacher = (draw(5, 6), draw(11, 6), draw(11)), (draw(5, 4), draw(11, 4), draw(11))
    for tensor in (*student, *teacher):
        tensor.requires_grad_(True)
    temperature, scales, caps = 1.7, (0.8, 1.3), (3.0, 2.0)
    result = _upstream.ChunkedDivergenceFunction.apply(
        *student, *teacher, beta, temperature, scales[0], caps[0], scales[1], caps[1]
    )
    assert len(result) == 2, "the kernel returns something else than divergence and student entropy"
    distributions = []
    for (hidden, weight, bias), scale, cap in zip((student, teacher), scales, caps, strict=True):
        logits = (hidden.detach().double() @ weight.detach().double().T + bias.detach().double()) * scale
        distributions.append(torch.softmax(cap * torch.tanh(logits / cap) / temperature, dim=-1))
    p, q = distributions

    def kl(first, second):
        return (first * (first.log() - second.log())).sum(-1)

    mixture = (1 - beta) * p + beta * q
    expected = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta, beta * kl(q, mixture) + (1 - beta) * kl(p, mixture))
    torch.testing.assert_close(result[0].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result[1].double(), -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-6)
    assert result[0].dtype == torch.float32
    assert not result[1].requires_grad, "the entropy has a gradient now; trainer.py returns it undetached"
    result[0].sum().backward()
    assert all(tensor.grad is not None for tensor in student)
    assert all(tensor.grad is None for tensor in teacher), "the teacher gets a gradient from the kernel"


def test_the_kernel_takes_no_token_at_all():
    """A micro-batch whose rollouts are all masked."""
    hidden = torch.zeros(0, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=True)
    divergence, entropy = _upstream.ChunkedDivergenceFunction.apply(
        hidden, weight, None, hidden.detach(), weight.detach(), None, 1.0, 1.0, 1.0, None, 1.0, None
    )
    assert divergence.shape == entropy.shape == (0,)
    divergence.sum().backward()
    assert not weight.grad.any()


def test_the_logit_scales_are_those_that_trl_reads():
    """loss/divergence.py repeats TRL's list, which lies inside a method that CRISPTrainer replaces."""
    source = inspect.getsource(inspect.unwrap(DistillationTrainer._compute_loss))
    upstream = set(re.findall(r'getattr\(student_config, "(\w+)"', source))
    ours = {"logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"}
    assert upstream == ours | {"final_logit_softcapping"}, (
        "TRL reads other fields of the config; see losses._logit_scale"
    )
    for name in ours:
        expected = 0.25 if name == "logits_scaling" else 4.0
        assert _logit_scale(SimpleNamespace(model_type="granite", **{name: 4.0})) == expected
    assert '"hyperclovax"' in source
    assert _logit_scale(SimpleNamespace(model_type="hyperclovax", logits_scaling=4.0)) == 4.0
    assert _logit_scale(SimpleNamespace(model_type="llama", logit_scale=None)) == 1.0


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_last_hidden_state_is_what_predicts_the_completion(tmp_path, tuning):
    peft_config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if tuning == "lora" else None
    trainer = make_trainer(tmp_path, peft_config=peft_config)
    model = trainer.model.eval()
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        hidden_BTH = trainer._get_last_hidden_state(model, ids, mask, 4)
        logits_BTV = model(input_ids=ids, attention_mask=mask).logits[:, -5:-1]
    assert hidden_BTH.shape[:2] == (2, 4), "it returns other positions than the completion's"
    torch.testing.assert_close(hidden_BTH @ model.get_output_embeddings().weight.T, logits_BTV)


# Rollouts and their batches


def test_the_engine_reads_the_weights_where_we_put_ours_and_only_in_another_step(tmp_path, monkeypatch):
    """rollouts/adapter_push.py sets `_iter_named_params` of the object, and trainer.py `_last_loaded_step` at a run's start."""
    model = tiny_llama()
    with receiving(engine_like(model), monkeypatch) as engine:
        trainer = make_trainer(tmp_path, model=model, use_vllm=True)
        sent = [(name, torch.full_like(parameter, 0.5)) for name, parameter in model.named_parameters()]
        trainer.vllm_generation._iter_named_params = lambda: iter(sent)
        for step, pushes in ((0, 1), (0, 1), (1, 2)):
            trainer.state.global_step = step
            trainer._generate_single_turn([[1, 2]], None, {})
            assert len(engine.pushes) == pushes, "TRL pushes at other times; see CRISPTrainer.train"
        assert (engine.pushes[0]["lm_head.weight"] == 0.5).all(), (
            "TRL reads the weights elsewhere; see adapter_push.py"
        )
        trainer._last_loaded_step = -1
        trainer._generate_single_turn([[1, 2]], None, {})
        assert len(engine.pushes) == 3


def test_a_subclass_may_leave_the_teacher_out(tmp_path):
    """`teacher_model=None`: CRISPTrainer has a teacher of its own."""
    args = DistillationConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = DistillationTrainer(tiny_llama(), None, args, rows(), processing_class=tiny_tokenizer())
    assert trainer.teacher_model is None


def test_the_parents_inputs_have_the_known_keys(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = DistillationTrainer._generate_and_score_completions(trainer, list(trainer.train_dataset)[:4])
    assert set(inputs) == {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "num_items_in_batch",
    }, "the parent's inputs changed; trainer.py builds both models' inputs from these keys"
    prompt_mask, completion_mask = inputs["prompt_mask"], inputs["completion_mask"]
    assert not (prompt_mask.diff(dim=1) < 0).any(), "prompts are not left-padded"
    assert not (completion_mask.diff(dim=1) > 0).any(), "completions are not right-padded"
    assert prompt_mask.min() == 0, "the rows of this test are too even to tell"
    assert inputs["num_items_in_batch"].item() == completion_mask.sum().item()


def test_prompts_are_tokenized_into_plain_lists_with_the_generation_prompt(tmp_path):
    trainer = make_trainer(tmp_path)
    result = trainer._tokenize_prompts([row["prompt"] for row in rows(3)])
    assert len(result) == 3, "_tokenize_prompts returned ids, images and multimodal fields; trainer.py takes the first"
    assert all(isinstance(token_id, int) for ids in result[0] for token_id in ids)
    assert all(tiny_tokenizer().decode(ids).endswith("assistant<|end_header_id|>\n\n") for ids in result[0])
    assert trainer._tokenize_prompts(["One?"])[0] == [tiny_tokenizer()("One?")["input_ids"]]


def test_shuffling_and_splitting_keep_added_tensors_with_their_rows(tmp_path):
    """`teacher_prompt_ids` and `teacher_prompt_mask`, and the count that is one number for all."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, instruction="v1")
    trainer.model.train()
    tokenizer, batch = tiny_tokenizer(), list(trainer.train_dataset)
    seen = []
    for step in range(4):
        trainer._step = step
        inputs = trainer._prepare_inputs(batch)
        assert inputs["num_items_in_batch"].item() == 8
        for i in range(2):
            texts = [
                tokenizer.decode(inputs[f"{side}_ids"][i][inputs[f"{side}_mask"][i].bool()])
                for side in ("prompt", "teacher_prompt")
            ]
            questions = [re.search(r"What is 9+ \+ \d+\?", text).group() for text in texts]
            assert questions[0] == questions[1], "a teacher's prompt is in another row than its student's"
            seen.append(questions[0])
    assert sorted(seen) == sorted(row["prompt"][0]["content"] for row in batch)
    assert seen != [row["prompt"][0]["content"] for row in batch], "nothing was shuffled, so this test cannot tell"


def test_a_window_of_the_sampler_is_one_generation_batch(tmp_path):
    """One rollout per prompt, all micro-batches of an optimizer step from one generation."""
    trainer = make_trainer(tmp_path, dataset=rows(13), per_device_train_batch_size=2, gradient_accumulation_steps=3)
    indices = list(trainer._get_train_sampler())
    windows = [indices[i : i + 6] for i in range(0, len(indices), 6)]
    assert len(windows) == 6
    assert windows[0] == windows[1] == windows[2]
    assert windows[3] == windows[4] == windows[5]
    assert len(set(windows[0] + windows[3])) == 12


def test_the_samplers_order_is_its_generators(tmp_path):
    """row_order.py seeds it anew for each epoch; the first one is TRL's."""
    trainer = make_trainer(tmp_path, dataset=rows(13))
    ours = trainer._get_train_sampler()
    theirs = DistillationTrainer._get_train_sampler(trainer)
    assert (theirs.shuffle, theirs.seed) == (True, trainer.args.seed)
    first, second = list(theirs), list(theirs)
    assert list(ours) == list(ours) == first
    assert first != second
    assert len(ours) == len(theirs)


def test_the_end_mark_of_a_checkpoint_is_written_after_all_else(tmp_path, monkeypatch):
    """checkpoints.py takes a checkpoint without trainer_state.json for torn, and seals the others' names before it."""
    written = []
    for owner, name in ((Trainer, "save_model"), (Trainer, "_save_rng_state"), (TrainerState, "save_to_json")):
        original = getattr(owner, name)

        def recorded(self, *args, _name=name, _original=original, **kwargs):
            written.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)
    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", lambda **kwargs: written.append("rotate"))
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert written == ["save_model", "_save_rng_state", "save_to_json", "rotate"]
    checkpoint = tmp_path / "checkpoint-1"
    listed = set(json.loads((checkpoint / "checkpoint_files.json").read_text()))
    there = {path.name for path in checkpoint.iterdir()}
    assert there - listed == {"trainer_state.json", "checkpoint_files.json"}


def test_the_counters_of_the_log_are_attributes(tmp_path):
    """trainer.py puts those of a checkpoint back once the loop has set them to zero."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert trainer._tr_loss.shape == ()
    assert trainer._globalstep_last_logged == 1


def test_rollouts_are_made_at_the_first_micro_batch_of_each_step(tmp_path, monkeypatch):
    """trainer.py refreshes the teacher where `_step` is a multiple of the accumulation, before the parent generates."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=3)
    made = []
    generate = trainer._generate_and_score_completions

    def record(inputs):
        made.append((trainer._step, trainer.state.global_step, len(inputs)))
        return generate(inputs)

    monkeypatch.setattr(trainer, "_generate_and_score_completions", record)
    trainer.train()
    assert made == [(0, 0, 6), (3, 1, 6), (6, 2, 6)], (
        "`_step` or `global_step` count otherwise than trainer.py assumes"
    )


def test_the_rollouts_of_a_step_are_a_new_list_of_micro_batches(tmp_path):
    """trainer.py sorts and trims them as soon as `_buffered_inputs` is another object."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.model.train()
    batch, buffers, given = list(trainer.train_dataset)[:4], [], []
    assert trainer._buffered_inputs is None
    for step in range(4):
        trainer._step = step
        given.append(DistillationTrainer._prepare_inputs(trainer, batch))
        buffers.append(trainer._buffered_inputs)
    assert buffers[0] is buffers[1] is not buffers[2] is buffers[3]
    assert [inputs is buffers[step][step % 2] for step, inputs in enumerate(given)] == [True] * 4
    assert [len(buffer) for buffer in buffers] == [2] * 4
    trainer.model.eval()
    trainer._prepare_inputs(batch)
    assert trainer._buffered_inputs is buffers[3], "an evaluation changed the rollouts of training"


def test_metrics_are_lists_that_log_averages_and_clears(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    assert set(trainer._metrics) == {"train", "eval"}
    assert all(isinstance(metrics, defaultdict) and metrics["unknown"] == [] for metrics in trainer._metrics.values())
    trainer.model.train()
    trainer._metrics["train"].update({"reverse_kl": [1.0, 3.0, math.nan]})
    trainer.log({"loss": 0.0})
    assert trainer.state.log_history[-1]["reverse_kl"] == 2.0
    assert not trainer._metrics["train"]
    trainer._generate_and_score_completions(list(trainer.train_dataset)[:4])
    assert len(trainer._metrics["train"]["completions/mean_length"]) == 1, (
        "trainer.py reads its last as this rollout's"
    )


# Checkpoints


def test_the_optimizers_hooks_run_for_every_checkpoint_and_after_the_students_weights(tmp_path, monkeypatch):
    calls = []

    def recorded(name):
        original = getattr(Trainer, name)

        def method(self, *args, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        return method

    save, load = (
        ["_save_checkpoint", "_save_optimizer_and_scheduler"],
        ["_load_from_checkpoint", "_load_optimizer_and_scheduler"],
    )
    for name in (*save, *load):
        monkeypatch.setattr(Trainer, name, recorded(name))
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    make_trainer(tmp_path, max_steps=1, **options).train()
    assert [name for name in calls if name in save] == save, "the teacher would not be saved with every checkpoint"
    calls.clear()
    make_trainer(tmp_path, max_steps=2, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert calls == [*load, *save], "the teacher is loaded in the second, and must come after the student's weights"


# PEFT


def two_adapters() -> PeftModel:
    """Return a model with two adapters that are no identity, the second unregistered as teacher.py does it."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora)
    model.add_adapter("teacher", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    del model.peft_config["teacher"]
    return model.eval()


def layers_of(model) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(torch.arange(1, 9).unsqueeze(0)).logits


def test_the_active_adapter_of_a_lora_layer_is_an_attribute_that_its_forward_reads():
    model = two_adapters()
    assert all(layer._active_adapter in ("default", ["default"]) for layer in layers_of(model))
    student = logits_of(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = [layer._active_adapter for layer in layers_of(model)]
    for layer in layers_of(model):
        layer._active_adapter = ["teacher"]
    teacher = logits_of(model)
    assert not torch.allclose(student, teacher, atol=1e-4), "a layer's _active_adapter is not read; see teacher.py"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    for layer, active in zip(layers_of(model), before, strict=True):
        layer._active_adapter = active
    assert torch.equal(logits_of(model), student)


def test_set_adapter_flips_requires_grad():
    """Why teacher.py does not use it. Where this fails, set_adapter may have become usable there."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    flags = {name: p.requires_grad for name, p in model.named_parameters() if "lora_" in name}
    assert all(flag == (".other." in name) for name, flag in flags.items())


def test_adding_an_adapter_leaves_the_first_active_and_trainable():
    model = two_adapters()
    assert model.active_adapters == ["default"]
    assert all(p.requires_grad for name, p in model.named_parameters() if ".default." in name)


def test_the_scaling_of_a_lora_layer_is_keyed_by_adapter():
    model = two_adapters()
    layers = layers_of(model)
    assert layers
    assert all(set(layer.scaling) == {"default", "teacher"} for layer in layers), "teacher.py copies it by these keys"
    before = logits_of(model)
    for layer in layers:
        layer.scaling["teacher"] *= 5
    assert torch.equal(logits_of(model), before)
    for layer in layers:
        layer.scaling["default"] *= 5
    assert not torch.allclose(logits_of(model), before, atol=1e-4)


def test_an_adapters_parameters_are_named_by_adapter():
    """teacher.py pairs the two adapters' parameters by the part of the name that is the adapter's."""
    names = [name for name, _ in two_adapters().named_parameters() if "lora_" in name]
    assert len(names) == 2 * 2 * 2 * 2  # layers, modules, A and B, adapters
    assert all(re.search(r"\.lora_[AB]\.(default|teacher)\.weight$", name) for name in names)
    assert {n.replace(".default.", ".teacher.") for n in names if ".default." in n} == {
        n for n in names if ".teacher." in n
    }


def test_save_pretrained_leaves_out_only_adapters_that_are_registered(tmp_path):
    """So the teacher's, which is not in peft_config, has to keep itself out of the layers' state_dict."""
    model = two_adapters()
    student = logits_of(model)
    model.save_pretrained(tmp_path / "as it is")
    assert [path for path in (tmp_path / "as it is").iterdir() if path.is_dir()] == [], "no folder for the teacher's"
    names = list(load_file(tmp_path / "as it is" / "adapter_model.safetensors"))
    assert sum(".teacher." in name for name in names) == 8, (
        "PEFT leaves unregistered adapters out by itself now: teacher.py needs no hook for it"
    )

    def drop(module, state_dict, prefix, local_metadata):
        for name in [name for name in state_dict if name.startswith(prefix) and ".teacher." in name]:
            del state_dict[name]

    for layer in layers_of(model):
        layer.register_state_dict_post_hook(drop)
    model.save_pretrained(tmp_path / "with a hook")
    names = list(load_file(tmp_path / "with a hook" / "adapter_model.safetensors"))
    assert len(names) == 8
    assert not any("teacher" in name for name in names), "PEFT saves past the layers' state_dict hooks"
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "with a hook").eval()
    assert torch.equal(logits_of(reloaded), student)


def test_saved_adapters_and_checkpoints_hold_no_tensor_of_the_teacher(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False)
    trainer = make_trainer(tmp_path, peft_config=lora, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("checkpoint-1", "final"):
        names = list(load_file(tmp_path / folder / "adapter_model.safetensors"))
        assert any("lora_A" in name for name in names)
        assert not [name for name in names if "teacher" in name], folder


def test_merged_is_a_flag_of_the_layer():
    model = two_adapters()
    assert not any(layer.merged for layer in layers_of(model))
    model.merge_adapter()
    assert all(layer.merged for layer in layers_of(model)), "teacher.py asserts on it during the teacher's pass"


# accelerate


def test_the_forward_redirection_steps_around_accelerates_autocast(tmp_path):
    """The reason for `self.accelerator.autocast()` in CRISPTrainer._compute_loss."""
    accelerator = make_trainer(tmp_path, bf16=True).accelerator
    assert accelerator.mixed_precision == "bf16"
    model = accelerator.prepare_model(tiny_llama())
    unwrapped = accelerator.unwrap_model(model)
    seen = []
    unwrapped.base_model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    ids = torch.arange(1, 5).unsqueeze(0)
    with torch.no_grad():
        model(ids)
        assert seen == [True], "accelerate does not put autocast on the model's forward any more"
        redirection = _ForwardRedirection()
        redirection(model, unwrapped, lambda ids: unwrapped.base_model(ids), ids)
        assert seen == [True, False], (
            "the redirection keeps accelerate's autocast now: `self.accelerator.autocast()` in trainer.py is not needed"
        )

        def with_autocast(ids):
            with accelerator.autocast():
                return unwrapped.base_model(ids)

        redirection(model, unwrapped, with_autocast, ids)
    assert seen == [True, False, True], "accelerator.autocast() does not turn autocast on"


def test_the_trainer_computes_both_models_under_autocast(tmp_path, monkeypatch):
    """The same for the student and for the teacher, whose wrapper is no model that accelerate prepared."""
    trainer = make_trainer(tmp_path, bf16=True, max_steps=1)
    assert trainer.model.dtype == torch.float32
    original, dtypes = trainer._get_last_hidden_state, []

    def record(model, *inputs):
        projection = model.model.layers[0].self_attn.q_proj
        with_hook = projection.register_forward_hook(
            lambda *args: dtypes.append((model is trainer.model, args[-1].dtype))
        )
        try:
            return original(model, *inputs)
        finally:
            with_hook.remove()

    monkeypatch.setattr(trainer, "_get_last_hidden_state", record)
    trainer.train()
    assert dtypes == [(False, torch.bfloat16), (True, torch.bfloat16)]
