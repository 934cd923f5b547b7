"""The base's answers to the monitor prompts: kept before the first step for each run, and read by its resume."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trl_crisp.health.reference import Reference
from trl_crisp.prompts.instructions import Prompt
from trl_crisp.run.files import write_json


def write_references(
    path: Path,
    prompts: Sequence[Prompt],
    references: Sequence[Reference | None],
) -> int:
    """
    Write the prompts that have a reference as a file that `trl-crisp eval --benchmark FILE` reads.

    Args:
        path: The .jsonl file. Each line has `id` (the prompt's number), `prompt` as it is, `answer`, `votes` and `base_agreement`.
        prompts: As the student has them.
        references: One for each prompt; those without one are left out.

    Returns:
        How many prompts were left out.
    """
    lines = [
        {
            "id": str(number),
            "prompt": prompt,
            "answer": reference.answer,
            "votes": reference.votes,
            "base_agreement": reference.base_agreement,
        }
        for number, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
        if reference is not None
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return len(prompts) - len(lines)


@dataclass(frozen=True)
class Base:
    """
    What the base's answers to the monitor prompts were, which a resumed run needs.

    Attributes:
        prompts: As the student has them.
        references: One for each prompt, or `None`.
        golds: The right answers that are used, by the number of the prompt.
        accuracies: The share of the base's samples that are right, for the same prompts.
    """

    prompts: list[Prompt]
    references: list[Reference | None]
    golds: Mapping[int, str | list[str]]
    accuracies: Mapping[int, float]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        lines = [
            {
                "prompt": prompt,
                "reference": None if reference is None else asdict(reference),
                "answer": self.golds.get(number),
                "accuracy": self.accuracies.get(number),
            }
            for number, (prompt, reference) in enumerate(zip(self.prompts, self.references, strict=True))
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"prompts": lines})

    def check(self, path: Path, prompts: Sequence[Prompt], golds: Mapping[int, str | list[str]]) -> None:
        """
        Check that a resumed run monitors what it monitored when it began.

        Args:
            path: Where they were read, for the error message.
            prompts: The monitor prompts now, as the student has them.
            golds: The right answers that are used now.

        Raises:
            ValueError: If it does not.
        """
        if self.prompts != list(prompts):
            pairs = itertools.zip_longest(self.prompts, prompts)
            first = next(number for number, (before, now) in enumerate(pairs) if before != now)
            raise ValueError(
                f"{path}: prompt {first} is not the one that this run monitors. The rows, the monitor_file or the seed have changed: "
                "set them back, or start again in another output_dir."
            )
        way_out = "Use the rows that it began with, or start again in another output_dir."
        if self.golds.keys() != golds.keys():
            raise ValueError(
                f"{path}: {len(self.golds)} of the monitor prompts had a right answer that was used when this run began, and now "
                f"{len(golds)} have. {way_out}"
            )
        if differing := [number for number in golds if self.golds[number] != golds[number]]:
            number = differing[0]
            raise ValueError(
                f"{path}: the right answer of prompt {number} was {self.golds[number]!r} when this run began, and now it is {golds[number]!r}, so "
                f"accuracy could not be compared with the base's. {way_out}"
            )


def base_path(directory: Path, run_id: str | None) -> Path:
    """Return where the base of a run is kept. A later run in the same output_dir leaves it there, so both can be resumed."""
    return directory / f"base-{run_id}.json"


def read_base(path: Path, step: int) -> Base:
    """
    Read what [`Base.write`] wrote.

    Args:
        path: The file.
        step: The run resumes after this step, for the error messages.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged.
    """
    way_out = "Put the file back (it was written where the run began), or start again in another output_dir."
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: this run resumes after step {step}, and the base's answers are not there, so there is nothing to compare with. {way_out}"
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        lines = read["prompts"]
        return Base(
            [line["prompt"] for line in lines],
            [None if line["reference"] is None else Reference(**line["reference"]) for line in lines],
            *(
                {number: line[key] for number, line in enumerate(lines) if line[key] is not None}
                for key in ("answer", "accuracy")
            ),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: this run resumes after step {step}, and the file of the base's answers is damaged ({type(error).__name__}: {error}), so "
            f"there is nothing to compare with. {way_out}"
        ) from error
