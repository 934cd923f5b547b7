"""The training script's arguments for the rows: which rows to train on, and how they become prompts."""

import warnings
from dataclasses import dataclass, field

from trl import ScriptArguments


@dataclass
class CRISPScriptArguments(ScriptArguments):
    """
    Arguments of the training script that choose the rows: TRL's, and those below.

    TRL's parameters with a wider meaning here:
        dataset_name (`str`):
            A dataset on the Hub, a local .jsonl, .json, .parquet or .csv file, or `reasoning-gym:TASK`.
        dataset_test_split (`str`, defaults to `"test"`):
            The split for evaluation during training (`eval_strategy`). Not used with `dataset_train_fraction`.

    Parameters that CRISP adds:
        prompt_column (`str`, defaults to `"prompt"`, TRL's name):
            The column with the prompts: strings, which the model reads without its chat template, or lists of messages, which
            the chat template renders. Strings that contain such a list as JSON are read as messages.
        teacher_prompt_column (`str`, *optional*):
            The column with the teacher's prompts, of the same type as the student's. They are used instead of the instruction.
            The authors' prompt set has the student's as `sft_prompt` and the teacher's as `sd_prompt` (code:
            prepare_length_prune_data.py). A column named `teacher_prompt` is used even if this is unset.
        prompt_template (`str`, *optional*):
            Text with `{column}` placeholders. It is filled in from each row and becomes a user message. For a literal brace write
            it twice. Used instead of `prompt_column`.
        deduplicate_prompts (`bool`, defaults to `True`, because the paper's training set has no repeated prompts):
            Keep only the first row of each prompt.
        dataset_train_fraction (`float`, *optional*):
            Share of the rows to train on; the rest is held out for evaluation. The authors' code has 0.8. If unset, all rows are
            used for training.
        dataset_split_seed (`int`, defaults to `42`, as in the authors' code):
            Seed of the split by `dataset_train_fraction`.
        dataset_size (`int`, defaults to `1000`, our choice: 31 steps of the paper's batch), dataset_seed (`int`, defaults to
        `42`, our choice: the same as the split's seed):
            Number of rows and seed of a reasoning-gym task, which generates its rows.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A dataset on the Hub, a .jsonl, .json, .parquet or .csv file, or reasoning-gym:TASK."},
    )
    prompt_column: str = field(
        default="prompt",
        metadata={
            "help": "The column that holds the prompts: lists of messages, or strings, which the model reads without its chat "
            "template (prompt_template makes messages of them)."
        },
    )
    teacher_prompt_column: str | None = field(
        default=None,
        metadata={"help": "The column that holds the teacher's prompts, which are used instead of the instruction."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Text with {column} placeholders, filled in from each row, that becomes a user message."},
    )
    deduplicate_prompts: bool = field(default=True, metadata={"help": "Keep only the first row of each prompt."})
    dataset_train_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the rows to train on; the rest is held out. All rows if unset."},
    )
    dataset_split_seed: int = field(default=42, metadata={"help": "Seed of the split by dataset_train_fraction."})
    dataset_size: int = field(default=1000, metadata={"help": "Number of rows that a reasoning-gym task generates."})
    dataset_seed: int = field(default=42, metadata={"help": "Seed of a reasoning-gym task."})

    def __post_init__(self) -> None:
        fraction = self.dataset_train_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(
                f"dataset_train_fraction={fraction} must be between 0 and 1, both excluded. Leave it unset to train "
                "on all rows."
            )
        if self.dataset_size < 1:
            raise ValueError(f"dataset_size={self.dataset_size} must be at least 1.")
        if self.prompt_template is not None and self.prompt_column != "prompt":
            warnings.warn(
                f"prompt_column={self.prompt_column!r} has no effect with prompt_template, which names its own columns.",
                stacklevel=3,
            )
