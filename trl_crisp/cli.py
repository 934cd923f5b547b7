"""
The command line `trl-crisp`.

`train` runs `accelerate launch -m trl_crisp.train`, `preflight` looks before it, `eval` measures a model, `report` shows what was
measured, `merge` makes one model of an adapter and its base, and `push` puts a model on the Hub.
"""

import argparse
import contextlib
import importlib.resources
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trl_crisp import __version__
from trl_crisp.prompts.chat_template_flags import json_object

TRAIN_DESCRIPTION = """\
Train a model to reason in fewer tokens, through `accelerate launch`.

  --accelerate_config NAME|FILE  how to launch: a name ({names})
                                 or a file that `accelerate config` wrote
  --num_processes N, ...         any option of `accelerate launch`

example:
  trl-crisp train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name reasoning-gym:gsm_symbolic --instruction v1 \\
      --max_completion_length 1024 --output_dir qwen3-0.6b-crisp
  trl-crisp train --config config.yaml --accelerate_config zero3 --num_processes 8
"""


COMMANDS_HELP = """\
commands:
  train      train a model
  preflight  tell before training what an instruction does to a model
  eval       measure accuracy and tokens
  report     write a page about results
  merge      make one model of an adapter and its base
  push       put a model on the Hub, with its results

example:
  trl-crisp train --config config.yaml --accelerate_config zero3

`trl-crisp COMMAND --help` lists a command's options.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="trl-crisp",
        usage="trl-crisp COMMAND [options]",
        description="CRISP for TRL: a model learns from itself, told to be concise, to reason in fewer tokens.",
        epilog=COMMANDS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl-crisp {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), nargs="?", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    # A shell may start a background command with SIGINT ignored. A SIGINT that is sent to this process is meant for it
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return COMMANDS[args.command](args.arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"trl-crisp {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "The finished answers are kept: the same command resumes with the rest."
        print("\nInterrupted." + (f" {kept}" if args.command in ("eval", "preflight") else ""), file=sys.stderr)
        return 128 + signal.SIGINT


def train(argv: list[str]) -> int:
    """
    Launch the training script.

    Args:
        argv: Options of training and of `accelerate launch`, in any order.

    Raises:
        ValueError: If an option belongs to neither, the launch config does not exist, or the model or the dataset is missing.
        FileNotFoundError: If the `--config` file does not exist.
    """
    from trl_crisp.train import EVERYDAY_FLAGS, check_config, check_required, did_you_mean, flag_name, make_parser

    # Before the imports that take seconds. With an unknown flag the check has to wait: that flag may be a misspelt --dataset_name
    if all(flag_name(item) in EVERYDAY_FLAGS for item in argv if item.startswith("--")):
        check_required(argv)

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from trl_crisp.run.interruption import COMMAND_VARIABLE, EXIT_CODES, SIGNALS

    parser = make_parser(prog="trl-crisp train")
    parser.usage = "trl-crisp train [--config FILE.yaml] [--accelerate_config NAME|FILE.yaml] [options]"
    parser.description = TRAIN_DESCRIPTION.format(names=", ".join(launch_config_names()))
    parser.epilog = None
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    typed = argv
    argv = check_config(parser, argv)
    training_argv, launch_argv = split_arguments(parser, argv)
    launch_parser = launch_command_parser()
    launch_argv = resolve_accelerate_config(launch_argv)
    options = {**parser._option_string_actions, **launch_parser._option_string_actions}
    for flag in (item.split("=")[0] for item in launch_argv):
        if flag.startswith("--") and flag not in launch_parser._option_string_actions:
            raise ValueError(
                f"{flag} is not an option of training or of accelerate launch.{did_you_mean(flag, options)}"
            )
    check_required(training_argv)
    # Launched as a module, because a launched file puts the package's directory on the import path
    args = launch_parser.parse_args([*launch_argv, "-m", "trl_crisp.train", *training_argv])
    _fill_in_defaults(args)
    os.environ[COMMAND_VARIABLE] = shlex.join(["trl-crisp", "train", *typed])
    # The training handles Ctrl-C and SIGTERM: it finishes its step and saves a checkpoint. If torch's launcher handled them too,
    # it would kill the training after half a minute
    args.signals_to_handle = "SIGHUP,SIGQUIT"
    before = {signum: signal.signal(signum, _hand_on) for signum in SIGNALS}
    try:
        launch_command(args)
    except subprocess.CalledProcessError as failure:
        # As in a shell: 128 plus the signal if a signal ended the process
        return failure.returncode if failure.returncode > 0 else 128 - failure.returncode
    except ChildFailedError as failure:
        from trl_crisp.health.guard import EXIT_CODE

        statuses = {process.exitcode for process in failure.failures.values()}
        if EXIT_CODE in statuses:
            return EXIT_CODE
        if stopped := statuses.intersection(EXIT_CODES):
            return min(stopped)
        # The processes' own tracebacks say what happened; the launcher's would only follow them
        rank, first = failure.get_first_failure()
        print(
            f"trl-crisp train: process {rank} failed first (exit status {first.exitcode}); its error is above.",
            file=sys.stderr,
        )
        # 2: the training refused its input
        return 2 if first.exitcode == 2 else 1
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 0


def _hand_on(signum: int, frame: FrameType | None) -> None:
    """Pass a signal on to the launched processes. If the terminal sent it to them too, they treat both as one."""
    import psutil

    # Its messages about processes that end with the signal's status look like failures
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signum)
    if not children:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)


def _fill_in_defaults(args: argparse.Namespace) -> None:
    """Set accelerate's own defaults if there is no launch config; otherwise accelerate prints five lines about them."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    if args.config_file is not None or Path(default_config_file).is_file():
        return
    if args.num_processes is None and (torch.cuda.is_available() or not torch.accelerator.is_available()):
        args.num_processes = torch.cuda.device_count()
    defaults = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def evaluate(argv: list[str]) -> int:
    """
    Measure accuracy and tokens, and print them; with --baseline, also print the changes.

    Args:
        argv: See `trl-crisp eval --help`.

    Raises:
        ValueError, FileNotFoundError, PermissionError, ConnectionError: If the model cannot be measured with these arguments.
    """
    parser = make_eval_parser()
    args = parser.parse_args(read_eval_config(parser, argv))
    if "config" in args:
        raise ValueError(f"--config {args.config}: give one file, and the option's whole name.")

    from trl_crisp.evaluation.results import load_results
    from trl_crisp.evaluation.settings import EvaluationSettings

    # Read before the imports, which take seconds, and the sampling, which may take hours
    baseline = load_results(args.baseline) if args.baseline else None
    fields = {name: value for name, value in vars(args).items() if name in EvaluationSettings.__dataclass_fields__}
    instruction = "" if args.instruction == "none" else args.instruction
    settings = EvaluationSettings(**{**fields, "budgets": tuple(args.budgets), "instruction": instruction})

    from trl_crisp.evaluation.evaluating import evaluate as run
    from trl_crisp.report.console import print_evaluation, print_start, progress
    from trl_crisp.run.known_warnings import silence_known_warnings

    silence_known_warnings()
    with progress() as on_progress:
        results = run(settings, args.output, on_progress, baseline, print_start)
    print_evaluation(results)
    print(f"Wrote {args.output / 'results.json'} and, with the answers, {args.output / 'samples.jsonl'}.")
    return 0


def make_eval_parser() -> argparse.ArgumentParser:
    """Return the parser of `trl-crisp eval`; its defaults are those of [`~trl_crisp.evaluation.settings.EvaluationSettings`]."""
    from trl_crisp.evaluation.grading import KINDS
    from trl_crisp.evaluation.settings import ENGINES, EvaluationSettings

    parser = argparse.ArgumentParser(
        prog="trl-crisp eval",
        description="Measure a model's accuracy and tokens on a benchmark, by default under the paper's protocol.",
        epilog="example:\n  trl-crisp eval --model Qwen/Qwen3-0.6B --benchmark math500 --limit 50 --samples 1 --output base\n"
        "  trl-crisp eval --model qwen3-crisp --benchmark math500 --limit 50 --samples 1 --output after --baseline base\n\n"
        "If an evaluation was interrupted, the same command resumes it.",
        formatter_class=_EvalHelp,
    )
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE.yaml",
        type=Path,
        default=argparse.SUPPRESS,
        help="values for the options below; flags override them",
    )
    add("--model", required=True, help="Hub id or directory of a model or an adapter")
    add(
        "--benchmark",
        required=True,
        help="math500, aime24, aime25, gsm8k, gpqa-diamond, mmlu, or a jsonl, json, parquet or csv file with question and answer",
    )
    add("--file", help="a local copy of the named benchmark's rows, for a machine without a network")
    add(
        "--instruction",
        default="none",
        help="none, or for a concise prompt: a name from the catalogue (v1, v2, ...), a text or a .txt file",
    )
    add(
        "--prompt-template",
        "--prompt_template",
        help="text with {column} placeholders that becomes the user's message; by default a named benchmark has its own, and a file "
        "gets the paper's for math and letters, and only the question for texts",
    )
    add("--system", help="a system message before each prompt")
    add(
        "--grader",
        choices=KINDS,
        help="how answers are graded; by default a named benchmark has its own kind, and a file is graded as choice if all its answers "
        "are letters A to J, as math if all can be read as math, else as text",
    )
    add("--samples", type=int, default=EvaluationSettings.samples, help="answers per problem")
    add("--temperature", type=float, default=EvaluationSettings.temperature, help="0 is greedy")
    add("--top-p", "--top_p", type=float, default=EvaluationSettings.top_p)
    add("--top-k", "--top_k", type=int, default=EvaluationSettings.top_k)
    add(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        default=EvaluationSettings.max_new_tokens,
        help="an answer is cut at this many tokens",
    )
    add(
        "--budgets",
        type=int,
        nargs="*",
        default=list(EvaluationSettings.budgets),
        help="smaller caps in tokens; the same samples are measured at them too",
    )
    add("--limit", type=int, default=EvaluationSettings.limit, help="measure only this many problems, from the first")
    add("--seed", type=int, default=EvaluationSettings.seed)
    add(
        "--chat-template-kwargs",
        "--chat_template_kwargs",
        type=json_object,
        help="flags of the chat template, as JSON: '{\"enable_thinking\": false}'",
    )
    add(
        "--engine",
        choices=ENGINES,
        default=EvaluationSettings.engine,
        help="vllm is faster, above all on a GPU",
    )
    add(
        "--tensor-parallel-size",
        "--tensor_parallel_size",
        type=int,
        default=EvaluationSettings.tensor_parallel_size,
        help="GPUs that share the model, with --engine vllm",
    )
    add(
        "--batch-size",
        "--batch_size",
        type=int,
        help="answers at once; by default 32 with transformers, and vLLM chooses",
    )
    add("--exact", action="store_true", help="grade exactly by the authors' rules")
    add("--baseline", type=Path, help="results of another evaluation of the same problems, to compare with")
    add("--output", type=Path, required=True, help="directory for samples.jsonl and results.json")
    return parser


def read_eval_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """
    Return the arguments of `trl-crisp eval`, with those of its `--config` file, if any, in front. Later arguments override them.

    Args:
        parser: From [`make_eval_parser`].
        argv: The arguments as typed.

    Raises:
        ValueError: If the file is not a mapping, a key is not an option, or an option cannot have its value.
        FileNotFoundError: If the file does not exist.
    """
    from trl_crisp.train import did_you_mean, read_config, separate_value

    argv = separate_value(argv, "--config")
    if "--config" not in argv:
        return argv
    position = argv.index("--config")
    if position + 1 == len(argv):
        raise ValueError("--config needs the path of a YAML file after it.")
    path = Path(argv[position + 1])
    config = {str(key).replace("-", "_"): value for key, value in read_config(path).items()}
    options = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if unknown := [key for key in config if key not in options]:
        hints = "".join(f"\n  {key}.{did_you_mean(key, options)}" for key in unknown)
        raise ValueError(f"--config {path} has keys that are not options of `trl-crisp eval`:{hints}")
    arguments = []
    for key, value in config.items():
        action = options[key]
        flag = action.option_strings[0]
        if value is None:
            # An empty value leaves the default
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"--config {path}: {key} is {value!r}; give true or false.")
            arguments += [flag] * value
        elif action.nargs == "*":
            if not isinstance(value, list):
                raise ValueError(f"--config {path}: {key} is {value!r}; give a list.")
            arguments += [flag, *map(str, value)]
        elif isinstance(value, dict) == (action.type is json_object) and not isinstance(value, list | bool):
            # As one argument, because a value may begin with a dash
            arguments.append(f"{flag}={json.dumps(value) if isinstance(value, dict) else value}")
        else:
            # YAML reads the words no, off and yes as booleans
            kind = (
                "a mapping"
                if action.type is json_object
                else "one value, in quotes if it is a word that YAML reads as something else"
            )
            raise ValueError(f"--config {path}: {key} is {value!r}; give {kind}.")
    return [*arguments, *argv[:position], *argv[position + 2 :]]


class _EvalHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def preflight(argv: list[str]) -> int:
    """
    Measure before training what instructions do to a model, and print numbers and verdicts.

    Args:
        argv: See `trl-crisp preflight --help`.

    Raises:
        ValueError, FileNotFoundError, PermissionError, ConnectionError: If the model cannot be measured with these arguments.
    """
    from trl_crisp.preflight.arguments import make_preflight_parser, output_of, settings_of

    args = make_preflight_parser().parse_args(argv)
    settings, output_dir = settings_of(args), output_of(args)

    from trl_crisp.preflight.running import run_preflight
    from trl_crisp.report.console import progress
    from trl_crisp.report.preflight_table import print_preflight, print_preflight_start
    from trl_crisp.run.known_warnings import silence_known_warnings

    silence_known_warnings()
    with progress() as on_progress:
        results = run_preflight(settings, output_dir, on_progress, print_preflight_start)
    print_preflight(results)
    print(f"Wrote {output_dir / 'preflight.json'} and, with the answers, {output_dir / 'samples'}.")
    return 0


def report(argv: list[str]) -> int:
    """
    Write the page of some results and runs.

    Args:
        argv: See `trl-crisp report --help`.

    Raises:
        ValueError, FileNotFoundError, ImportError: See [`~trl_crisp.report.page.write_report`].
    """
    from trl_crisp.report.arguments import make_report_parser

    args = make_report_parser().parse_args(argv)

    from trl_crisp.report.page import write_report

    written = write_report(args.results, args.output, args.run)
    print(f"Wrote {' and '.join(map(str, written))}.")
    return 0


def merge(argv: list[str]) -> int:
    """
    Merge an adapter into its base.

    Args:
        argv: See `trl-crisp merge --help`.

    Raises:
        ValueError, FileNotFoundError, PermissionError, ConnectionError: See [`~trl_crisp.publish.merging.merge_adapter`].
    """
    from trl_crisp.publish.arguments import make_merge_parser

    args = make_merge_parser().parse_args(argv)

    from trl_crisp.publish.merging import describe_merge, merge_adapter
    from trl_crisp.run.known_warnings import silence_known_warnings

    silence_known_warnings()
    print(describe_merge(merge_adapter(args.adapter, args.output), args.adapter))
    return 0


def push(argv: list[str]) -> int:
    """
    Push a model to the Hub, with its card, results and report.

    Args:
        argv: See `trl-crisp push --help`.

    Raises:
        ValueError, FileNotFoundError: See [`~trl_crisp.publish.folder.make_folder`].
    """
    from trl_crisp.publish.arguments import make_push_parser

    args = make_push_parser().parse_args(argv)

    from trl_crisp.publish.folder import make_folder
    from trl_crisp.publish.pushing import check_repo, describe_failed_push, push_folder

    check_repo(args.repo)
    folder = make_folder(args.directory, args.repo, args.results)
    print(folder.describe())
    if args.dry_run:
        print("Nothing was pushed (--dry-run).")
        return 0
    options = {"private": args.private or None, "revision": args.revision}
    try:
        push_folder(folder, args.repo, **options)
    # Any failure is reported in the same way, because the model and the folder are on disk
    except Exception as error:
        print(describe_failed_push(error, args.directory, args.repo, args.results, **options), file=sys.stderr)
        return 1
    print(f"The model is on the Hub at https://huggingface.co/{args.repo}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "preflight": preflight,
    "eval": evaluate,
    "report": report,
    "merge": merge,
    "push": push,
}


def split_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that the training's parser knows and the others, each in order."""
    _, others = parser.parse_known_args(argv)
    known = []
    rest = iter(others)
    other = next(rest, None)
    for item in argv:
        if item == other:
            other = next(rest, None)
        else:
            known.append(item)
    return known, others


def resolve_accelerate_config(launch_argv: list[str]) -> list[str]:
    """
    Replace `--accelerate_config NAME|FILE` with accelerate's `--config_file FILE`.

    Raises:
        ValueError: If the name is neither a file nor a config that TRL includes.
    """
    from trl_crisp.train import separate_value

    argv = separate_value(launch_argv, "--accelerate_config")
    if "--accelerate_config" not in argv:
        return argv
    position = argv.index("--accelerate_config")
    names = ", ".join(launch_config_names())
    if position + 1 == len(argv):
        raise ValueError(f"--accelerate_config needs a file or a name: {names}.")
    name = argv[position + 1]
    path = Path(name)
    if not path.is_file():
        if name not in launch_config_names():
            raise ValueError(f"--accelerate_config {name}: there is no such file, and the names are {names}.")
        path = Path(str(importlib.resources.files("trl.accelerate_configs") / f"{name}.yaml"))
    return ["--config_file", str(path), *argv[:position], *argv[position + 2 :]]


def launch_config_names() -> list[str]:
    """Return the names of the launch configs that TRL includes, except FSDP 1, under which the teacher cannot be refreshed."""
    files = importlib.resources.files("trl.accelerate_configs").iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml") and file.name != "fsdp1.yaml")


if __name__ == "__main__":
    raise SystemExit(main())
