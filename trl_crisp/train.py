"""The training script: `accelerate launch -m trl_crisp.train --config CONFIG.yaml`, or `trl-crisp train`.

As in TRL's own scripts, every field is a flag, a YAML file gives new defaults, and flags override the file.
"""

import argparse
import dataclasses
import difflib
import gc
import itertools
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from trl import ModelConfig, TrlParser

    from trl_crisp.config import CRISPConfig
    from trl_crisp.health.measuring import BenchmarkArguments, BenchmarkCallback
    from trl_crisp.prompts.instructions import Prompt
    from trl_crisp.rows.arguments import CRISPScriptArguments
    from trl_crisp.trainer import CRISPTrainer

# The closing hint asks the shortest prompt among this many rows
_HINTED_ROWS = 20

EXAMPLE = """\
example:
  {prog} --model_name_or_path Qwen/Qwen3-0.6B --dataset_name reasoning-gym:gsm_symbolic --instruction v1 \\
      --max_completion_length 1024 --output_dir qwen3-0.6b-crisp
  {prog} --config config.yaml --learning_rate 2e-6
"""

# The fields that every run needs, and what to set them to
REQUIRED = {
    "model_name_or_path": "a model on the Hub, such as Qwen/Qwen3-0.6B, or a local directory",
    "dataset_name": "a dataset on the Hub, a local .jsonl, .json, .parquet or .csv file, or reasoning-gym:TASK",
}
# If a command has only these flags, none of them is misspelt, so a missing field can be reported before the heavy imports
EVERYDAY_FLAGS = {
    *REQUIRED,
    *("output_dir", "instruction", "prompt_template", "prompt_column", "learning_rate", "max_steps", "use_peft"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length"),
    *("use_cpu", "bf16", "report_to", "lora_target_modules", "save_steps", "logging_steps", "num_processes"),
}
# Names that other tools use -> our fields
_OTHER_NAMES = {
    "lr": "learning_rate",
    "bs": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_id": "model_name_or_path",
    "model_path": "model_name_or_path",
    "dataset": "dataset_name",
    "data": "dataset_name",
    "train_file": "dataset_name",
    "output": "output_dir",
    "out": "output_dir",
    "out_dir": "output_dir",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "wd": "weight_decay",
    "resume": "resume_from_checkpoint",
    "lora": "use_peft",
    "peft": "use_peft",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "wandb": "report_to",
    "vllm": "use_vllm",
    "cpu": "use_cpu",
    "template": "prompt_template",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def make_parser(prog: str | None = None) -> "TrlParser":
    """Return the parser of the script's arguments: the rows, the training, the model, the measurements."""
    from trl import ModelConfig, TrlParser

    from trl_crisp.config import CRISPConfig
    from trl_crisp.health.measuring import BenchmarkArguments
    from trl_crisp.rows.arguments import CRISPScriptArguments

    parser = TrlParser(
        [CRISPScriptArguments, CRISPConfig, ModelConfig, BenchmarkArguments],  # type: ignore[list-item]
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [options]",
        description="Train a model to reason in fewer tokens; the teacher is the model itself, told to be concise.",
        epilog=EXAMPLE.format(prog=prog or "python -m trl_crisp.train"),
        formatter_class=_HelpFormatter,
        # With abbreviations allowed, this parser would take flags that are meant for the launcher (`trl-crisp train --num_processes 2`)
        allow_abbrev=False,
    )
    # TrlParser removes --config before it parses. It is added here so that the help lists it and it is not an unknown flag
    parser.add_argument(
        "--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="Values for the fields; flags override them."
    )
    _arrange_help(parser)
    return parser


def _arrange_help(parser: argparse.ArgumentParser) -> None:
    """Put CRISP's own fields before the several hundred lines of inherited ones."""
    from trl import DistillationConfig, ScriptArguments

    from trl_crisp.config import CRISPConfig
    from trl_crisp.health.measuring import BenchmarkArguments
    from trl_crisp.rows.arguments import CRISPScriptArguments

    own = set(CRISPConfig.__dataclass_fields__) - set(DistillationConfig.__dataclass_fields__)
    own |= set(CRISPScriptArguments.__dataclass_fields__) - set(ScriptArguments.__dataclass_fields__)
    own |= set(BenchmarkArguments.__dataclass_fields__)
    first = {"config", "model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint"}
    positionals, options = parser._positionals, parser._optionals
    for title, names in (("input and output", first), ("CRISP", own)):
        group = parser.add_argument_group(title)
        group._group_actions += [action for action in options._group_actions if action.dest in names]
    taken = first | own
    options._group_actions[:] = [action for action in options._group_actions if action.dest not in taken]
    options.title = "TRL and transformers"
    parser._action_groups[:] = [positionals, *parser._action_groups[2:], options]
    for action in parser._actions:
        # The config refuses these fields, because the teacher is the student
        if action.dest in ("teacher_model_name_or_path", "teacher_model_revision"):
            action.help = argparse.SUPPRESS


def parse_args(
    argv: list[str] | None = None, prog: str | None = None
) -> tuple["CRISPScriptArguments", "CRISPConfig", "ModelConfig", "BenchmarkArguments"]:
    """
    Parse the script's arguments.

    Args:
        argv: Flags, optionally with `--config FILE.yaml`. If `None`, the flags of the process.
        prog: The program's name in the help.

    Raises:
        ValueError: If a key of the file or a flag is not a field.
        FileNotFoundError: If the file does not exist.
    """
    parser = make_parser(prog)
    argv = check_config(parser, sys.argv[1:] if argv is None else argv)
    # Before the values are checked, because a misspelt flag may be the reason that a required field is unset
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = next((item for item in unknown if item.startswith("-")), unknown[0])
        raise ValueError(f"unknown argument {flag!r}.{did_you_mean(flag, parser._option_string_actions)}")
    script_args, training_args, model_args, benchmark_args = parser.parse_args_and_config(argv)
    return script_args, training_args, model_args, benchmark_args


def check_config(parser: "TrlParser", argv: list[str]) -> list[str]:
    """
    Check the YAML file that `--config` names, and return the arguments with `--config FILE` as two items.

    Raises:
        ValueError: If the file is not a mapping, or has keys that are not fields.
        FileNotFoundError: If the file does not exist.
    """
    argv = separate_value(argv, "--config")
    if "--config" not in argv:
        return argv
    position = argv.index("--config") + 1
    if position == len(argv):
        raise ValueError("--config needs the path of a YAML file after it.")
    path = Path(argv[position])
    config = read_config(path)
    # TrlParser itself reads `env`, a mapping of environment variables
    fields = {action.dest for action in parser._actions} - {"help", "config"} | {"env"}
    if unknown := [key for key in config if key not in fields]:
        hints = "".join(f"\n  {key}.{did_you_mean(str(key), fields)}" for key in unknown)
        raise ValueError(
            f"--config {path} has keys that are not fields of this script:{hints}\nGive options of `accelerate launch`, "
            "such as num_processes, on the command line."
        )
    return argv


def read_config(path: Path) -> dict[Any, Any]:
    """
    Return the fields of a YAML file that `--config` names.

    Raises:
        ValueError: If the file is not a mapping.
        FileNotFoundError: If the file does not exist.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file (looked for {path.absolute()}).")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} must hold `field: value` lines; it holds {type(config).__name__}.")
    return config


def separate_value(argv: list[str], option: str) -> list[str]:
    """Return the arguments with `OPTION=VALUE` as two items."""
    return [part for arg in argv for part in (arg.split("=", 1) if arg.startswith(f"{option}=") else [arg])]


def did_you_mean(name: str, known: Any) -> str:
    """Return a sentence that suggests the known names closest to `name`, or an empty string."""
    known = list(known)
    dashes = "--" if name.startswith("--") else ""
    other = dashes + _OTHER_NAMES.get(flag_name(name), "")
    close = [other] if other in known else difflib.get_close_matches(name.split("=")[0], known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def flag_name(flag: str) -> str:
    """Return the name of the field that a flag such as `--output-dir=X` sets."""
    return flag.split("=")[0].removeprefix("--").replace("-", "_")


def check_required(argv: list[str]) -> None:
    """
    Check that the flags, or the file that `--config` names, give a model and a dataset. This needs no heavy import.

    Raises:
        ValueError: If one is missing; the message names it.
    """
    if {"-h", "--help"} & set(argv):
        return
    given = {flag_name(item) for item in argv if item.startswith("--")}
    if "config" in given:
        import yaml

        argv = separate_value(argv, "--config")
        try:
            config = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text(encoding="utf-8"))
            given |= {key for key, value in config.items() if value is not None}
        # `check_config` reports what is wrong with the file
        except (OSError, IndexError, ValueError, AttributeError, yaml.YAMLError):
            return
    if missing := [name for name in REQUIRED if name not in given]:
        nouns = " and ".join(f"no {name.split('_')[0]}" for name in missing)
        raise ValueError(f"{nouns}: set" + "".join(f"\n  --{name} to {REQUIRED[name]}" for name in missing))


def main(
    script_args: "CRISPScriptArguments",
    training_args: "CRISPConfig",
    model_args: "ModelConfig",
    benchmark_args: "BenchmarkArguments | None" = None,
) -> None:
    """
    Train and save; measure and push if asked to.

    Raises:
        ValueError: If arguments do not fit each other or the rows.
        FileNotFoundError, PermissionError, ConnectionError: If the model, the rows or the checkpoint cannot be loaded.
        SystemExit: After Ctrl-C (status 130) and SIGTERM (143), if the model is lost (status 3;
            [`~trl_crisp.health.ending.describe_lost`]), and if the
            push of the finished model failed (status 1).
    """
    from trl import get_peft_config, get_quantization_config

    from trl_crisp.health.attach import attach_health
    from trl_crisp.health.ending import describe_lost
    from trl_crisp.health.guard import EXIT_CODE
    from trl_crisp.health.monitor_prompts import load_monitor_file
    from trl_crisp.models.source import check_model, check_tokenizer
    from trl_crisp.prompts.instructions import resolve_instruction
    from trl_crisp.publish.pushing import describe_failed_push
    from trl_crisp.report.console import progress
    from trl_crisp.rows.loading import unreadable_rows_named
    from trl_crisp.rows.prompts import load_prompts
    from trl_crisp.run.identity import resolve_checkpoint
    from trl_crisp.run.interruption import SaveOnInterrupt, ignore_signals, resume_command
    from trl_crisp.trainer import CRISPTrainer

    # Only the first process reports what happens to the rows
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_crisp").setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)

    if training_args.process_index == 0:
        warn_of_no_effect(script_args, model_args, benchmark_args)
    # These checks come before the dataset, which may take minutes to prepare
    resolve_instruction(training_args.instruction)
    model = check_model(model_args.model_name_or_path, model_args.model_revision, training_args.trust_remote_code)
    check_tokenizer(model, training_args.trust_remote_code)
    assert training_args.output_dir is not None  # TrainingArguments fills it in
    output_dir = Path(training_args.output_dir)
    resume_from_checkpoint = resolve_checkpoint(
        training_args.resume_from_checkpoint, output_dir, training_args.allow_changed_resume
    )

    # The quantization is passed to the trainer separately, because the trainer refuses it in model_init_kwargs
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),  # type: ignore[dict-item]
    }
    # The first process prepares the rows; the others read them from the cache of `datasets`
    with training_args.main_process_first(desc="preparing the prompts"):
        train_dataset, eval_dataset = load_prompts(script_args, evaluation=training_args.eval_strategy != "no")

    interrupt = SaveOnInterrupt()
    # A stream reads its rows during training
    rows_file = Path(script_args.dataset_name or "").expanduser()
    with unreadable_rows_named(rows_file):
        trainer = CRISPTrainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    trainer.dataset_name = script_args.dataset_name
    benchmark = add_benchmark(trainer, benchmark_args) if benchmark_args and benchmark_args.eval_benchmark else None
    file = training_args.monitor_file
    health = attach_health(
        trainer, monitor_dataset=load_monitor_file(file, script_args) if file is not None else None, progress=progress
    )
    # Behind what measures, so that a signal during a measurement ends the run after it and not a step later
    trainer.add_callback(interrupt)
    try:
        with unreadable_rows_named(rows_file):
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    finally:
        interrupt.restore()
    accelerator = trainer.accelerator
    if describe_lost(trainer, health) is not None:
        ignore_signals()
        trainer.save_state()
        accelerator.print(f"The last step's checkpoint is in {output_dir}.")
        if accelerator.is_main_process:
            print(write_page(output_dir))
        accelerator.wait_for_everyone()
        del trainer, benchmark, health
        _end(accelerator)
        sys.exit(EXIT_CODE)
    if interrupt.stopped_at_step is not None:
        # When one process ends, a launcher signals the others
        ignore_signals()
        accelerator.print(
            f"Stopped after step {interrupt.stopped_at_step}; its checkpoint is in {output_dir}. Resume with:\n  "
            + resume_command()
        )
        trainer.save_state()
        if accelerator.is_main_process:
            print(write_page(output_dir))
        accelerator.wait_for_everyone()
        del trainer, benchmark, health
        _end(accelerator)
        sys.exit(interrupt.exit_code)
    # Without _internal_call, save_model would also push to the Hub, which happens below
    trainer.save_model(str(output_dir), _internal_call=True)
    # Writes the run's log next to the model
    trainer.save_state()
    if benchmark is not None:
        trainer.accelerator.print(benchmark.describe_best(trainer.state))
    prompts = [row["prompt"] for row in itertools.islice(trainer.train_dataset, _HINTED_ROWS)]
    trainer.accelerator.print(next_steps(output_dir, model_args.use_peft, prompts))
    if accelerator.is_main_process:
        print(write_page(output_dir))

    if training_args.push_to_hub:
        try:
            trainer.push_to_hub()
        # Any failure is reported in the same way, because the trained model is on disk
        except Exception as error:
            options = {"private": training_args.hub_private_repo, "revision": training_args.hub_revision}
            print(describe_failed_push(error, output_dir, trainer.hub_model_id, **options), file=sys.stderr)
            sys.exit(1)
        trainer.accelerator.print(f"The model is on the Hub at https://huggingface.co/{trainer.hub_model_id}")

    del trainer, benchmark, health
    _end(accelerator)


def _end(accelerator: "Accelerator") -> None:
    """
    Finish the trackers and end the process group. The caller deletes the trainer first.

    The wrapped model and the optimizer hold the group too. If its threads lived until the interpreter shuts down, they would
    sometimes abort a process that has done all its work (pytorch/pytorch#190489). DeepSpeed's threads end only with the group.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def warn_of_no_effect(
    script_args: "CRISPScriptArguments", model_args: "ModelConfig", benchmark_args: "BenchmarkArguments | None" = None
) -> None:
    """Warn of arguments that were set but have no effect because of the other arguments."""

    def changed(arguments: Any, prefix: str) -> list[str]:
        fields = (field for field in dataclasses.fields(arguments) if field.name.startswith(prefix))
        return [field.name for field in fields if getattr(arguments, field.name) != _default(field)]

    no_effect = {}
    if not model_args.use_peft:
        no_effect["use_peft"] = changed(model_args, "lora_")
    if benchmark_args and not benchmark_args.eval_benchmark:
        no_effect["eval_benchmark"] = changed(benchmark_args, "eval_benchmark_")
    if not (script_args.dataset_name or "").startswith("reasoning-gym:"):
        no_effect["a reasoning-gym task"] = changed(script_args, "dataset_size") + changed(script_args, "dataset_seed")
    if script_args.dataset_train_fraction is None:
        no_effect["dataset_train_fraction"] = changed(script_args, "dataset_split_seed")
    for needed, names in no_effect.items():
        if names:
            warnings.warn(f"{', '.join(names)} has no effect without {needed}.", stacklevel=3)


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def add_benchmark(trainer: "CRISPTrainer", benchmark_args: "BenchmarkArguments") -> "BenchmarkCallback":
    """Make the trainer measure accuracy and tokens during training; see [`BenchmarkArguments`]."""
    from trl_crisp.evaluation.settings import EvaluationSettings
    from trl_crisp.health.measuring import BenchmarkCallback
    from trl_crisp.report.console import progress

    assert benchmark_args.eval_benchmark is not None
    settings = EvaluationSettings(
        model=trainer.model.config._name_or_path,
        benchmark=benchmark_args.eval_benchmark,
        file=benchmark_args.eval_benchmark_file,
        limit=benchmark_args.eval_benchmark_limit,
        samples=benchmark_args.eval_benchmark_samples,
        max_new_tokens=benchmark_args.eval_benchmark_max_new_tokens,
        batch_size=benchmark_args.eval_benchmark_batch_size,
        seed=trainer.args.seed,
        chat_template_kwargs=trainer.args.chat_template_kwargs,
    )
    callback = BenchmarkCallback(
        trainer,
        settings,
        benchmark_args.eval_benchmark_steps,
        benchmark_args.eval_benchmark_max_accuracy_drop,
        progress,
    )
    trainer.add_callback(callback)
    trainer.accelerator.print(callback.describe_start())
    return callback


def write_page(output_dir: Path) -> str:
    """Write the page of a run, and return where it is, or why there is none: the run itself is not at fault."""
    from trl_crisp.report.page import write_run_page

    try:
        page = write_run_page(output_dir)
    except (ImportError, OSError, ValueError) as error:
        return f"There is no page of this run: {error}"
    return f"The page of this run, to open in a browser: {page.absolute()}"


def next_steps(output_dir: Path, is_adapter: bool, prompts: "Sequence[Prompt]") -> str:
    """
    Return the location of the model, and a command that asks it one of the user's own prompts.

    Args:
        output_dir: Where the model was saved.
        is_adapter: Whether an adapter was trained.
        prompts: Some of the rows' prompts; the command asks the shortest.
    """
    what = "LoRA adapter" if is_adapter else "model"
    prompt = min(prompts, key=lambda one: len(str(one)))
    answer = "[0]['generated_text']" + ("" if isinstance(prompt, str) else "[-1]['content']")
    program = (
        "from transformers import pipeline; "
        f"print(pipeline('text-generation', {str(output_dir)!r})({prompt!r}, max_new_tokens=1024){answer})"
    )
    return f"The {what} is in {output_dir}. See it answer one of your prompts:\n  python -c {shlex.quote(program)}"


def run(argv: list[str] | None = None) -> None:
    """
    Parse the arguments and train. An error that this package raises about the input is printed without a traceback.

    Args:
        argv: As in [`parse_args`].

    Raises:
        SystemExit: With status 2 after such an error, and as in [`main`].
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if all(flag_name(item) in EVERYDAY_FLAGS for item in argv if item.startswith("--")):
            check_required(argv)

        from trl_crisp.run.interruption import ending_with_words
        from trl_crisp.run.known_warnings import silence_known_warnings

        silence_known_warnings()
        with ending_with_words():
            main(*parse_args(argv))
    except (ValueError, OSError, ImportError) as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        if Path(__file__).parent not in Path(frames[-1][0].f_code.co_filename).parents:
            raise
        print(f"error: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
