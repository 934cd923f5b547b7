"""The teacher: where its weights are, when they are refreshed from the student, and what a checkpoint saves of it.

One interface, [`Teacher`], for three places of the teacher's weights:

| teacher | full fine-tuning | LoRA |
|---|---|---|
| periodic, base, ema | [`CopyTeacher`]: a frozen copy of the student | [`AdapterTeacher`]: a second adapter on one base model |
| live | [`LiveTeacher`]: the student itself | [`LiveTeacher`] |
"""

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn

from trl_crisp.config import CRISPConfig
from trl_crisp.models.adapter_checks import check_adapter
from trl_crisp.teacher.adapter import AdapterTeacher
from trl_crisp.teacher.copied import CopyTeacher
from trl_crisp.teacher.schedule import LiveTeacher, Teacher
from trl_crisp.teacher.sharding import check_backend

__all__ = ["AdapterTeacher", "CopyTeacher", "LiveTeacher", "Teacher", "make_teacher"]


def make_teacher(student: nn.Module, args: CRISPConfig, accelerator: Accelerator) -> Teacher:
    """
    Make the teacher of a student, from the student's weights as they are now.

    Args:
        student: The model before it is wrapped for distributed training. With LoRA a second adapter is added to it.
        args: The run's config.
        accelerator: The run's accelerator, which places and shards a copied teacher.

    Raises:
        ValueError: If the student's adapter cannot be shared, or the distributed backend does not support this teacher.
    """
    check_backend(accelerator)
    if is_peft_model(student):
        check_adapter(student, args, accelerator)
        return (
            LiveTeacher(student, args)
            if args.teacher_model_kind == "live"
            else AdapterTeacher(student, args, accelerator)
        )
    if args.teacher_model_kind == "live":
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError(
                "teacher_model_kind='live' does not work under DeepSpeed ZeRO-3: the teacher's pass over the student's modules breaks its "
                "parameter trace. Use ZeRO-2 or FSDP2 (examples/accelerate/zero2.yaml, fsdp2.yaml), or teacher_model_kind='periodic' with "
                "teacher_sync_steps=1, which has the same weights at every step."
            )
        return LiveTeacher(student, args)
    return CopyTeacher(student, args, accelerator)
