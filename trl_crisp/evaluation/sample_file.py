"""samples.jsonl: each sampled answer on disk as soon as it is finished, so that an interrupted evaluation can resume.

The first line holds the protocol that the samples depend on. Each further line holds one [`Sample`]. Lines are only appended. A last
line that was cut off when the process was killed is dropped.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_crisp.evaluation.problems import Problem


@dataclass(frozen=True)
class Sample:
    """
    One sampled answer.

    Attributes:
        problem: The problem's id.
        number: The sample's number among those of the problem, from 0.
        text: The answer, with special tokens that are part of it (such as `<think>`), without the token that ended it.
        token_ids: The sampled token ids, including the token that ended the answer.
        thinking_tokens: How many of the tokens are thinking; 0 if the model does not think.
        ended_by_eos: Whether the model ended the answer; `False` if it was cut at the cap.
        prompt_sha256: The digest of the prompt's token ids.
    """

    problem: str
    number: int
    text: str
    token_ids: list[int]
    thinking_tokens: int
    ended_by_eos: bool
    prompt_sha256: str


# The Python types of the fields in JSON
_SAMPLE_TYPES = {
    "problem": str,
    "number": int,
    "text": str,
    "token_ids": list,
    "thinking_tokens": int,
    "ended_by_eos": bool,
    "prompt_sha256": str,
}


class SampleFile:
    """
    The samples of an evaluation on disk.

    Args:
        path: The file. It is made, with its directory, if it does not exist.
        protocol: What the samples depend on.

    Raises:
        ValueError: If the file has samples of another protocol, if a line does not hold a sample, or if nothing tells whether the
            weights are still the same. The message names the difference or the line.
    """

    def __init__(self, path: Path, protocol: dict[str, Any]) -> None:
        self.path = path
        self.samples: dict[tuple[str, int], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if lines and not lines[-1].endswith(b"\n"):
            # The process was killed while it wrote this line
            with path.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
            lines = lines[:-1]
        if not lines:
            path.write_text(json.dumps({"protocol": protocol}) + "\n", encoding="utf-8")
            return
        before = _read_protocol(lines[0], path)
        now = json.loads(json.dumps(protocol))
        if differing := [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]:
            listed = "".join(
                f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in sorted(differing)
            )
            raise ValueError(f"{path} has samples of another run:{listed}\nGive another --output, or remove the file.")
        if "model" in now and not (now.get("model_revision") or now.get("weights_sha256")):
            raise ValueError(
                f"{path} has samples, and neither a commit nor a digest tells whether the weights of {now['model']!r} are still those "
                "that they came from. Give another --output, or remove the file."
            )
        for number, line in enumerate(lines[1:], start=2):
            sample = _read_sample(line, path, number)
            self.samples[sample.problem, sample.number] = sample

    def add(self, sample: Sample) -> None:
        """Append one sample."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
        self.samples[sample.problem, sample.number] = sample

    def check_prompts(self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]]) -> None:
        """
        Check that the samples answer the prompts that the problems have now.

        Args:
            problems: The problems of the evaluation.
            prompts: The token ids of each problem's prompt.

        Raises:
            ValueError: If a problem's prompt has changed.
        """
        digests = {problem.id: sha256_of_ids(ids) for problem, ids in zip(problems, prompts, strict=True)}
        for sample in self.samples.values():
            if digests.get(sample.problem, sample.prompt_sha256) != sample.prompt_sha256:
                raise ValueError(
                    f"{self.path} has an answer to problem {sample.problem!r} with another prompt: the problem, the chat template or the "
                    "tokenizer has changed. Give another --output, or remove the file."
                )


def sha256_of_ids(token_ids: Sequence[int]) -> str:
    """Return the digest of token ids."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()


def _read_protocol(line: bytes, path: Path) -> dict[str, Any]:
    try:
        protocol = json.loads(line.decode("utf-8"))["protocol"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line 1: it holds no protocol ({type(error).__name__}: {error}), so nothing tells what the samples came from. Give "
            "another --output, or remove the file."
        ) from error
    if not isinstance(protocol, dict):
        raise ValueError(f"{path}, line 1: the protocol is a {type(protocol).__name__}. Give another --output.")
    return protocol


def _read_sample(line: bytes, path: Path, number: int) -> Sample:
    try:
        values = json.loads(line.decode("utf-8").rstrip())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        sample = Sample(**values)
        for name, kind in _SAMPLE_TYPES.items():
            # isinstance would take true for an integer
            if type(value := getattr(sample, name)) is not kind:
                raise ValueError(f"{name} is a {type(value).__name__}")
        if other := [value for value in sample.token_ids if type(value) is not int]:
            raise ValueError(f"token_ids has {other[0]!r}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: this line does not hold a sample ({error}). Remove the line; the same command then samples that "
            "answer again."
        ) from error
    return sample
