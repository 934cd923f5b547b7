"""The results of a model card: the evaluations of one model on several benchmarks, each with the base's where it was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_crisp.report.page import judge_results
from trl_crisp.report.run_log import RunLog
from trl_crisp.report.sources import Compared, Evaluated, load_compared
from trl_crisp.report.verdict import Verdict


@dataclass(frozen=True)
class CardResults:
    """
    One benchmark's evaluations.

    Attributes:
        compared: All of them, the base first. If the base was not measured, the model's own alone.
        own: That of the card's model.
        verdict: On the model, against the base; `None` without a base.
    """

    compared: Compared
    own: Evaluated
    verdict: Verdict | None

    @property
    def protocol(self) -> dict[str, Any]:
        """How the model was measured."""
        found: dict[str, Any] = self.own.results["protocol"]
        return found

    @property
    def budget_tokens(self) -> int:
        """An answer was cut at this many tokens."""
        return self.compared.budget_tokens

    @property
    def summary(self) -> dict[str, Any]:
        """The model's measures."""
        return self.own.summary(self.budget_tokens)

    @property
    def samples(self) -> int:
        """Answers per problem."""
        return int(self.own.results["samples"])

    @property
    def benchmark(self) -> str:
        """The benchmark's name, without a path."""
        return Path(str(self.protocol.get("benchmark"))).stem

    @property
    def source(self) -> str:
        """The Hub id of the problems, or a file's name."""
        return str(self.protocol.get("benchmark_source") or Path(str(self.protocol.get("benchmark"))).name)

    @property
    def file_names(self) -> list[str]:
        """A name for each of the evaluations, in their order: base, told and after."""
        names: list[str] = []
        for one in self.compared.all:
            name = "after" if one is self.own else {"base": "base", "concise": "told"}[one.role]
            while name in names:
                name += "-again"
            names.append(name)
        return names


def load_card_results(paths: Sequence[Path], run: RunLog | None = None) -> CardResults:
    """
    Read the evaluations of one benchmark.

    Args:
        paths: Results of `trl-crisp eval`: the base first, then, if it was measured, the base told to be concise, and the model's own; or the
            model's own alone.
        run: The training, of which the signals at the model's step are part of the verdict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If they cannot be compared ([`~trl_crisp.report.sources.load_compared`]), or not exactly one is of a trained model.
    """
    compared = load_compared(paths)
    if len(compared.all) == 1:
        return CardResults(compared, compared.base, None)
    if len(compared.trained) != 1:
        listed = "".join(f"\n  {one.path}: {one.name}" for one in compared.all)
        raise ValueError(
            f"a card is about one model, and of these results {len(compared.trained)} are of a trained one:{listed}\nGive the base's, if it was "
            "measured that of the base told to be concise, and the model's own."
        )
    (own,) = compared.trained
    verdict = next(one.verdict for one in judge_results(compared, [] if run is None else [run]) if one.result is own)
    return CardResults(compared, own, verdict)
