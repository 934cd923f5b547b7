"""What a loss keeps in memory: of the teacher's pass only the hidden states of the tokens in the loss, and no logits."""

import pytest
import torch
from peft import LoraConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import made_up_rollouts, make_trainer
from trl_crisp.loss import kernel
from trl_crisp.models.hidden_states import backbone

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
LENGTHS = [30, 12, 25, 30]
# Tokens that tools wrote
MASKED = {0: [0, 1, 2], 2: [5]}
LOSS_TOKENS = sum(LENGTHS) - 4
CHUNK_TOKENS = 8


class MadeTensors(TorchDispatchMode):
    """Records every tensor that an operation makes, views and changes in place apart: shape, dtype, bytes and storage."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[torch.Size, torch.dtype, int, StorageWeakRef]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.made.append((tensor.shape, tensor.dtype, storage.nbytes(), StorageWeakRef(storage)))
        return output

    def live_bytes(self) -> int:
        """Return the bytes of the floating-point tensors that are still in memory, scalars apart."""
        return sum(
            size for shape, dtype, size, ref in self.made if shape and dtype.is_floating_point and not ref.expired()
        )


def a_loss(tmp_path, monkeypatch, peft_config, **overrides):
    """Return a trainer, a micro-batch of it, and chunks of the loss that are smaller than the micro-batch."""
    monkeypatch.setattr(kernel, "CPU_CHUNK_TOKENS", CHUNK_TOKENS)
    trainer = make_trainer(tmp_path, peft_config=peft_config, **overrides)
    batch, _ = made_up_rollouts(trainer.model.config.vocab_size, LENGTHS, masked=MASKED)
    trainer.model.train()
    return trainer, batch | {"num_items_in_batch": torch.tensor(4)}


@pytest.mark.filterwarnings("ignore:The teacher follows the student")
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["periodic", "live"])
def test_the_teachers_pass_ends_before_the_students_and_leaves_its_tokens_in_the_loss(
    tmp_path, monkeypatch, peft_config, kind
):
    trainer, batch = a_loss(tmp_path, monkeypatch, peft_config, teacher_model_kind=kind)
    made, passes = MadeTensors(), []
    with trainer.teacher.serving() as teacher:
        bodies = {backbone(trainer.model), backbone(teacher)}

    def begin(body, args, kwargs):
        passes.append((torch.is_grad_enabled(), made.live_bytes()))

    handles = [body.register_forward_pre_hook(begin, with_kwargs=True) for body in bodies]
    with made:
        trainer.compute_loss(trainer.model, batch)
    for handle in handles:
        handle.remove()
    # The teacher's pass has no gradient, the student's has one
    assert [has_gradient for has_gradient, _ in passes] == [False, True]
    hidden_bytes = LOSS_TOKENS * trainer.model.config.hidden_size * 4
    assert passes[1][1] == hidden_bytes


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_no_logits_outlive_the_loss(tmp_path, monkeypatch, peft_config, beta):
    """Neither of all tokens at once, nor of any token once the loss is there, while the graph waits for its backward."""
    trainer, batch = a_loss(tmp_path, monkeypatch, peft_config, beta=beta)
    vocab_size = trainer.model.config.vocab_size
    with MadeTensors() as made:
        loss = trainer.compute_loss(trainer.model, batch)
    logits = [one for one in made.made if one[0][-1:] == (vocab_size,)]
    # A chunk of both models, or the sample of the top tokens' overlap
    rows = max(shape.numel() // vocab_size for shape, *_ in logits)
    assert CHUNK_TOKENS <= rows <= 32 < LOSS_TOKENS
    assert all(ref.expired() for *_, ref in logits)
    loss.backward()


@pytest.mark.filterwarnings("ignore:The teacher follows the student")
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_live_teacher_leaves_the_students_weights_their_gradients_under_autocast(tmp_path, monkeypatch, peft_config):
    """Autocast keeps converted weights; those of the teacher's pass have no gradient."""
    trainer, batch = a_loss(tmp_path, monkeypatch, peft_config, teacher_model_kind="live", bf16=True)
    trainer.compute_loss(trainer.model, batch).backward()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    assert not without
    # An adapter's B is zero at first, so only its own gradient is not
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_A" not in name)
