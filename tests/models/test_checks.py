"""Which models train right: padding, positions, causality and the head of many architectures, each against itself unpadded."""

import copy

import pytest
import torch
from peft import LoraConfig
from trl import DistillationTrainer

from tests.helpers import made_up_rollouts, make_trainer
from tests.oracles import completion_logits, divergence_nats, mean_loss
from tests.tiny_architectures import NEEDS_POSITIONS, PADDED_AS_THEY_ARE, REFUSED, VOCAB_SIZE, tiny_architecture
from tests.tiny_models import tiny_model, tiny_tokenizer
from trl_crisp.models.checks import probe_model
from trl_crisp.models.hidden_states import last_hidden_state

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")

LENGTHS_TOKENS = [3, 11, 19, 6]


def ragged_rows() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Return rows of different lengths, and the same padded on their left with their mask."""
    generator = torch.Generator().manual_seed(3)
    lists = [torch.randint(5, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS_TOKENS]
    width = max(LENGTHS_TOKENS)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in lists])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in lists])
    return lists, ids, mask


@pytest.mark.parametrize("kind", [*PADDED_AS_THEY_ARE, *NEEDS_POSITIONS])
def test_a_padded_row_has_the_hidden_states_that_it_has_alone(kind):
    """With position ids for the architectures that need them, and without for the others."""
    model = tiny_architecture(kind)
    pass_positions = probe_model(model, pad_token_id=0)
    assert pass_positions == (kind in NEEDS_POSITIONS)
    lists, ids, mask = ragged_rows()
    with torch.no_grad():
        hidden = last_hidden_state(model, ids, mask, pass_positions)
        for i, row in enumerate(lists):
            alone = model.base_model if kind != "llama4_text" else model.model
            expected = alone(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden[i, -len(row) :], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NEEDS_POSITIONS)
def test_without_positions_the_hidden_states_differ(kind):
    """The test above would pass on relative positions alone."""
    model = tiny_architecture(kind)
    lists, ids, mask = ragged_rows()
    with torch.no_grad():
        hidden = last_hidden_state(model, ids, mask, pass_positions=False)[0, -len(lists[0]) :]
        alone = last_hidden_state(model, torch.tensor([lists[0]]), torch.ones(1, len(lists[0])), False)[0]
    assert (hidden - alone).norm() / alone.norm() > 1e-4


@pytest.mark.parametrize("kind", [*NEEDS_POSITIONS, "bloom", "mamba", "llama4_text", "opt"])
def test_rollouts_of_a_padded_batch_are_those_of_each_row_alone(kind):
    """transformers' generate counts the positions of the accepted models itself."""
    model = tiny_architecture(kind)
    lists, ids, mask = ragged_rows()
    fields = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **fields)[:, ids.shape[1] :].tolist()
    for i, row in enumerate(lists):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **fields)
        assert together[i] == alone[0, len(row) :].tolist()


@pytest.mark.parametrize(("kind", "reason"), [(kind, reason) for kind, (_, reason) in REFUSED.items()])
def test_models_that_would_train_wrong_are_refused(kind, reason):
    """They count positions from the padding on, ignore the mask, look ahead, or transform the head's input."""
    with pytest.raises(ValueError, match=reason):
        probe_model(tiny_architecture(kind), pad_token_id=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2", "opt", "xglm"])
def test_rounding_does_not_pass_for_an_effect_of_padding(kind, dtype):
    """In half precision two passes of one row differ, too."""
    assert probe_model(tiny_architecture(kind).to(dtype), pad_token_id=0) == (kind in NEEDS_POSITIONS)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_probe_leaves_the_model_and_the_random_numbers_alone(kind):
    model = tiny_architecture(kind).train()
    next(model.children()).eval()  # one part that a user froze in evaluation mode
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    probe_model(model, pad_token_id=0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def fitting_model(kind: str):
    """Return a model whose vocabulary is that of the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    model = tiny_architecture(
        kind,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.mark.parametrize(
    ("kind", "tuning"),
    [
        ("gpt2", "full"),
        ("gpt2", "lora"),
        ("xglm", "full"),
        ("llama4_text", "full"),
        ("qwen3_moe", "lora"),
        ("bloom", "full"),
    ],
)
def test_the_loss_of_a_padded_batch_equals_the_oracle(tmp_path, kind, tuning):
    """Student and teacher have prompts of different lengths; the oracle passes each row alone."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if tuning == "lora" else None
    trainer = make_trainer(tmp_path, model=fitting_model(kind), peft_config=peft_config)
    torch.manual_seed(7)
    with torch.no_grad():
        for _, _, weights in trainer.teacher._weight_pairs():
            weights.add_(torch.randn_like(weights) * 0.05)
    model = trainer.model.eval()
    batch, plain = made_up_rollouts(model.config.vocab_size, [4, 2, 3])
    loss = trainer.compute_loss(model, batch | {"num_items_in_batch": torch.tensor(3)})

    divergences = []
    with torch.no_grad(), trainer.teacher.serving() as served:
        # A copy, because the shared one answers as the student once the pass is over
        teacher = copy.deepcopy(served)
    with torch.no_grad():
        for i, completion in enumerate(plain["completions"]):
            q = completion_logits(model, plain["students"][i], completion).tolist()
            p = completion_logits(teacher, plain["teachers"][i], completion).tolist()
            divergences.append([divergence_nats(q_t, p_t, 1.0) for q_t, p_t in zip(q, p, strict=True)])
    assert loss.item() == pytest.approx(mean_loss(divergences, plain["masks"], "sequence"), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_hidden_states_of_tokens_are_the_parents(tmp_path, kind):
    """To rounding, because the parent's rows begin with padding, and ours with their first token."""
    trainer = make_trainer(tmp_path, kind)
    model = trainer.model.eval()
    batch, _ = made_up_rollouts(model.config.vocab_size, [4, 2, 3])
    inputs = (
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        4,
    )
    with torch.no_grad():
        ours = trainer._get_last_hidden_state(model, *inputs)
        parents = DistillationTrainer._get_last_hidden_state(trainer, model, *inputs)
    is_token = batch["completion_mask"] != 0
    torch.testing.assert_close(ours[is_token], parents[is_token])


@pytest.mark.parametrize("kind", ["rwkv", "bart"])
def test_the_trainer_refuses_them_at_construction(tmp_path, kind):
    with pytest.raises(ValueError, match="padded on its left"):
        make_trainer(tmp_path, model=fitting_model(kind))


@pytest.mark.parametrize("kind", ["llama4_text", "qwen3_moe", "gpt2", "mamba"])
def test_models_that_the_checks_admit_train(tmp_path, kind):
    trainer = make_trainer(tmp_path, model=fitting_model(kind), max_steps=2)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


def test_a_failing_forward_is_told_at_construction(tmp_path):
    """With what failed, instead of in the first step."""
    model = tiny_model()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"fails on a row of 16 tokens.*RuntimeError"):
        make_trainer(tmp_path, model=model)


def test_weights_that_are_nan_are_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        make_trainer(tmp_path, model=model)


def test_an_infinite_head_weight_is_refused(tmp_path):
    """Unlike a bias it does not mask: its product with a hidden state is infinite of either sign."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = -torch.inf
    with pytest.raises(ValueError, match="only its bias can mask"):
        make_trainer(tmp_path, model=model)


def test_logits_that_the_model_masks_after_its_head_are_refused(tmp_path):
    """The loss would not see the mask."""
    model = tiny_model()
    forward = model.forward

    def masking(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., 5] = torch.finfo(torch.float32).min
        return output

    model.forward = masking
    with pytest.raises(ValueError, match="other logits than its output head"):
        probe_model(model, pad_token_id=0)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_nothing_to_train_is_refused(tmp_path, tuning):
    if tuning == "full":
        with pytest.raises(ValueError, match=r"model\.requires_grad_\(True\)"):
            make_trainer(tmp_path, model=tiny_model().requires_grad_(False))
        return
    from peft import PeftModel, get_peft_model

    get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(tmp_path, model=PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"))


def test_a_load_balancing_loss_that_is_not_trained_is_refused(tmp_path):
    model = fitting_model("qwen3_moe")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True"):
        make_trainer(tmp_path, model=model)
