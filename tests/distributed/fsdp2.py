"""
FSDP2 on two processes, without the trainer: accelerate turns FSDP on CPUs into plain DDP.

The wrapping is accelerate's own (`fsdp2_prepare_model`), over gloo; only the `Accelerator` that it reads its settings
from is made by hand.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from trl.models.utils import _ForwardRedirection

from tests.distributed.runs import LORA, SCALE, pushed_weights
from tests.tiny_models import tiny_llama
from trl_crisp import CRISPConfig
from trl_crisp.loss.divergence import output_head
from trl_crisp.loss.kernel import fused_loss
from trl_crisp.teacher import Teacher, make_teacher
from trl_crisp.teacher.sharding import named_parameters

STEPS = 3
LEARNING_RATE = 1e-4
EMA_RATE = 0.25
PROMPT_TOKENS, COMPLETION_TOKENS = 5, 7


@dataclass(frozen=True)
class Case:
    """A student and its teacher, trained for `STEPS` steps with a refresh at the start of step 2."""

    kind: str = "periodic"
    lora: bool = False
    # Of the whole teacher, or of a LoRA adapter; the student computes in float32
    teacher_dtype: str = "float32"
    # Of the frozen base under an adapter
    base_dtype: str = "float32"
    tied: bool = False
    # As fsdp_cpu_ram_efficient_loading leaves the processes after the first: without weights
    one_process_loads: bool = False


CASES = {
    "periodic": Case(),
    "periodic-tied": Case(tied=True),
    "periodic-one_loads": Case(one_process_loads=True),
    "periodic-bfloat16": Case(teacher_dtype="bfloat16"),
    "ema": Case("ema"),
    "ema-bfloat16": Case("ema", teacher_dtype="bfloat16"),
    "live": Case("live"),
    "lora-periodic": Case(lora=True),
    "lora-one_loads": Case(lora=True, one_process_loads=True),
    "lora-ema-bfloat16": Case("ema", lora=True, teacher_dtype="bfloat16"),
    "lora-live": Case("live", lora=True),
    "lora-bfloat16_base": Case(lora=True, base_dtype="bfloat16"),
}


def train(case: Case, directory: Path, sharded: bool) -> dict[str, Any]:
    """
    Train on made-up rollouts.

    Returns:
        The losses, and full weights by name: the student's change, its weights at the last refresh, the teacher's at the
        end and its moving averages.
    """
    args = CRISPConfig(
        str(directory),
        use_cpu=True,
        bf16=False,
        report_to="none",
        teacher_model_kind=case.kind,
        teacher_sync_steps=None if case.kind == "live" else 2,
        teacher_update_rate=EMA_RATE if case.kind == "ema" else None,
        teacher_model_init_kwargs=None if case.lora else {"dtype": case.teacher_dtype},
    )
    accelerator: Any = _accelerator(case, sharded)
    student: Any = tiny_llama(scale=4.0 if case.tied else SCALE, tie_word_embeddings=case.tied).train()
    dtype = getattr(torch, case.teacher_dtype)
    for parameter in student.parameters():
        # So that a teacher of that dtype begins as the very same
        parameter.data = parameter.data.to(dtype).float()
    if case.one_process_loads and sharded and dist.get_rank() > 0:
        _drop_weights(student)
    if case.lora:
        torch.manual_seed(1)
        student = get_peft_model(student, LoraConfig(**LORA, init_lora_weights=False))
        for parameter in student.parameters():
            own_dtype = dtype if parameter.requires_grad else getattr(torch, case.base_dtype)
            parameter.data = parameter.data.to(own_dtype)
    teacher = make_teacher(student, args, accelerator)
    if case.lora:
        # accelerate does so with mixed precision, for trained parameters
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if sharded:
        student = fsdp2_prepare_model(accelerator, student)
        assert all(isinstance(parameter, DTensor) for parameter in student.parameters())

    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=LEARNING_RATE)
    before, at_refresh, losses = _trained(student), {}, []
    for step in range(1, STEPS + 1):
        teacher.begin_step(step)
        if teacher.is_due(step):
            at_refresh = _trained(student)
        optimizer.zero_grad()
        # Each process a rollout of its own, and the mean over both; alone, both of them
        mine = [dist.get_rank()] if sharded else [0, 1]
        loss = _ForwardRedirection()(student, student, _loss, student, teacher, step, mine)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            # As an evaluation does: a forward that no backward follows
            _ForwardRedirection()(student, student, _loss, student, teacher, step, mine)
        losses.append(_mean_over_processes(loss.detach()).item() if sharded else loss.item())
    served = getattr(teacher, "_model", student)

    def weights_of_teacher() -> dict[str, dict[str, torch.Tensor]]:
        own = {name: p for name, p in served.named_parameters() if not case.lora or ".teacher." in name}
        averages = {name: _full(average) for name, average in teacher._averages.items()}
        return {"teacher": {name: _full(p) for name, p in own.items()}, "averages": averages}

    at_the_end = weights_of_teacher()
    # After a forward that no backward follows, which leaves gathered weights behind
    pushed = pushed_weights(student, accelerator)
    if sharded:
        _save_spoil_and_load(teacher, directory / f"{case}")
    return {
        "losses": losses,
        "change": {name: weight - before[name] for name, weight in _trained(student).items()},
        "student_at_refresh": at_refresh,
        "pushed": pushed,
        **at_the_end,
        "restored": weights_of_teacher(),
    }


def _save_spoil_and_load(teacher: Teacher, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    teacher.save(directory, write=dist.get_rank() == 0)
    dist.barrier()
    with torch.no_grad():
        for _, _, target in teacher._weight_pairs():
            target.zero_()
        for average in teacher._averages.values():
            average.zero_()
    teacher.load(directory)


def _loss(student, teacher: Teacher, step: int, rollouts: list[int]) -> torch.Tensor:
    with torch.no_grad(), teacher.serving() as served:
        if teacher.wrapped_model is None:
            teacher_hidden_BTH = _last_hidden(served, "teacher", step, rollouts)
        else:
            teacher_hidden_BTH = _ForwardRedirection()(
                teacher.wrapped_model, served, _last_hidden, served, "teacher", step, rollouts
            )
        teacher_head = output_head(served, teacher_hidden_BTH.dtype)
    # The teacher's pass first, as in the trainer
    student_hidden_BTH = _last_hidden(student, "student", step, rollouts)
    student_head = output_head(student, student_hidden_BTH.dtype)
    tokens = len(rollouts) * COMPLETION_TOKENS
    loss, _ = fused_loss(
        student_hidden_BTH.flatten(0, 1),
        student_head,
        teacher_hidden_BTH.flatten(0, 1).to(student_hidden_BTH.dtype),
        teacher_head,
        torch.ones(tokens, dtype=torch.long),
        torch.full((tokens,), 1 / tokens),
        1.0,
        1.0,
    )
    return loss


def _last_hidden(model, side: str, step: int, rollouts: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    completion_ids = torch.randint(0, 256, (2, COMPLETION_TOKENS), generator=generator)
    generator.manual_seed(100 * step + (side == "teacher"))
    prompt_ids = torch.randint(0, 256, (2, PROMPT_TOKENS), generator=generator)
    backbone = (model.base_model.model if hasattr(model, "peft_config") else model).base_model
    ids = torch.cat([prompt_ids, completion_ids], dim=1)[rollouts]
    return backbone(ids, use_cache=False).last_hidden_state[:, PROMPT_TOKENS - 1 : -1]


def _accelerator(case: Case, sharded: bool) -> SimpleNamespace:
    plugin = None
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=case.one_process_loads,
        )
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None),
        distributed_type=DistributedType.FSDP if sharded else DistributedType.NO,
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        process_index=dist.get_rank(),
    )


def _drop_weights(model: torch.nn.Module) -> None:
    # transformers leaves parameters on the meta device, and computes the buffers that no checkpoint has
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))


def _trained(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    # The reshard before it is that of a refresh: a forward without a backward leaves gathered weights behind
    return {name: _full(parameter) for name, parameter in named_parameters(student) if parameter.requires_grad}


def _mean_over_processes(loss: torch.Tensor) -> torch.Tensor:
    total = loss.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
