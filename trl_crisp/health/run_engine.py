"""The engines that answer during training: the vLLM that the run's rollouts come from, or the model itself. No second copy of the weights."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trl_crisp._upstream import unwrap_model_for_generation
from trl_crisp.evaluation.engines import Engine, PaceTeller, TransformersEngine, answer_requests, vllm_sampling
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.prompts import check_positions
from trl_crisp.evaluation.sampling import Completion, eos_token_ids_of

# As many as TRL's client has connections
_REQUESTS_AT_ONCE = 64


@dataclass(frozen=True)
class Share:
    """
    Which answers a process draws.

    Attributes:
        number, of: It draws every `of`-th answer, from the answer `number`.
        keeps: Whether it keeps them. The processes of a tensor-parallel engine draw the same answers, and one of them keeps them.
    """

    number: int
    of: int
    keeps: bool = True


def can_answer(trainer: Any) -> bool:
    """Whether the run's engine can answer: vLLM always, transformers unless FSDP shards the model."""
    return trainer.use_vllm or not trainer.is_fsdp_enabled


def engine_name(trainer: Any) -> str:
    """Return the name of the run's engine, one of [`~trl_crisp.evaluation.settings.ENGINES`]."""
    return "vllm" if trainer.use_vllm else "transformers"


def check_lengths(
    trainer: Any, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], max_new_tokens: int, option: str
) -> None:
    """
    Check that the model, and vLLM if it answers, have enough positions for each prompt and its answer.

    Args:
        trainer: Its engine answers.
        problems: The error names the problem with the longest prompt.
        prompts: The token ids of each problem's prompt.
        max_new_tokens: An answer is cut at this many tokens.
        option: The user's name for the cap, for the error message.

    Raises:
        ValueError: If the longest prompt and its answer need more positions than there are.
    """
    check_positions(trainer.model.config, problems, prompts, max_new_tokens, option)
    if not trainer.use_vllm or trainer.vllm_mode != "colocate":
        # What a server can take is its own setting, and its error names it
        return
    most_tokens = trainer.vllm_generation.llm.llm_engine.model_config.max_model_len
    prompt_tokens = max(map(len, prompts))
    if prompt_tokens + max_new_tokens > most_tokens:
        raise ValueError(
            f"the longest prompt has {prompt_tokens} tokens, and with an answer of {option}={max_new_tokens} it does not fit into the run's "
            f"vLLM, which takes {most_tokens} tokens. Raise vllm_max_model_length to {prompt_tokens + max_new_tokens}, or lower {option}."
        )


@contextmanager
def run_engine(trainer: Any, tokenizer: Any) -> Iterator[tuple[Engine, Share]]:
    """
    Give the engine that answers with the student's weights, and this process's share of the answers. All processes call it.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`]. If vLLM samples its rollouts, it answers here too; else the model generates.
        tokenizer: The tokenizer, with the chat template of the rollouts.
    """
    accelerator = trainer.accelerator
    if not trainer.use_vllm:
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as unwrapped:
            yield (
                TransformersEngine(unwrapped, tokenizer),  # type: ignore[arg-type]
                Share(accelerator.process_index, accelerator.num_processes),
            )
        return
    generation = trainer.vllm_generation
    generation.sync_weights()
    # The rollouts of the next step have the same weights
    trainer._last_loaded_step = trainer.state.global_step
    eos_token_ids = sorted(eos_token_ids_of(trainer.model.generation_config))
    if generation.mode == "server":
        is_first = accelerator.is_main_process
        share = Share(0, 1) if is_first else Share(0, 1, keeps=False)
        yield ServerEngine(generation.vllm_client if is_first else None, tokenizer, eos_token_ids), share
        return
    shared_by = generation.tensor_parallel_size
    share = Share(
        accelerator.process_index // shared_by,
        accelerator.num_processes // shared_by,
        keeps=accelerator.process_index % shared_by == 0,
    )
    if generation.enable_sleep_mode:
        generation.llm.wake_up(tags=["kv_cache"])
    try:
        yield ColocatedEngine(generation.llm, tokenizer, eos_token_ids), share
    finally:
        if generation.enable_sleep_mode:
            # As after rollouts: the weights are dropped, and TRL sends them again before it samples
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True


class ColocatedEngine:
    """
    Generates with the vLLM that runs in the training process.

    Args:
        llm: vLLM's `LLM`, awake.
        tokenizer: The model's tokenizer, with its chat template.
        eos_token_ids: These tokens end an answer.
    """

    name = "vllm"

    def __init__(self, llm: Any, tokenizer: Any, eos_token_ids: list[int]) -> None:
        self._llm, self.tokenizer, self._eos = llm, tokenizer, eos_token_ids

    def describe(self) -> dict[str, Any]:
        """See [`~trl_crisp.evaluation.engines.Engine.describe`]."""
        from vllm.platforms import current_platform

        return {
            "dtype": str(self._llm.llm_engine.model_config.dtype).removeprefix("torch."),
            "device": current_platform.device_type,
            "eos_token_ids": self._eos,
            "versions": _versions(),
        }

    def generate(self, prompt_token_ids, places, on_completion, on_progress, *, batch_size, **sampling) -> None:
        """See [`~trl_crisp.evaluation.engines.Engine.generate`]. vLLM chooses how many answers are sampled at once."""
        answer_requests(
            self._llm.llm_engine, self._eos, prompt_token_ids, places, on_completion, on_progress, **sampling
        )


class ServerEngine:
    """
    Generates with the vLLM server that the rollouts come from, one request per answer, because each has a seed of its own.

    Args:
        client: TRL's `VLLMClient`; `None` on processes that do not talk to the server.
        tokenizer: The model's tokenizer, with its chat template.
        eos_token_ids: These tokens end an answer.
    """

    name = "vllm"

    def __init__(self, client: Any, tokenizer: Any, eos_token_ids: list[int]) -> None:
        self._client, self.tokenizer, self._eos = client, tokenizer, eos_token_ids

    def describe(self) -> dict[str, Any]:
        """See [`~trl_crisp.evaluation.engines.Engine.describe`]. The dtype and the device are the server's own, which the client does not know."""
        return {
            "dtype": "the server's",
            "device": "the server's",
            "eos_token_ids": self._eos,
            "versions": _versions(),
        }

    def generate(self, prompt_token_ids, places, on_completion, on_progress, *, batch_size, **sampling) -> None:
        """See [`~trl_crisp.evaluation.engines.Engine.generate`]. The server chooses how many answers are sampled at once."""
        if self._client is None:
            return
        tell = PaceTeller(len(prompt_token_ids), on_progress)
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            answers = {
                pool.submit(self._answer, list(ids), place, sampling): index
                for index, (ids, place) in enumerate(zip(prompt_token_ids, places, strict=True))
            }
            for answer in as_completed(answers):
                token_ids = answer.result()
                on_completion(answers[answer], Completion(token_ids, token_ids[-1] in self._eos))
                tell.add(len(token_ids))
                tell.report()

    def _answer(self, ids: list[int], place: int, sampling: dict[str, Any]) -> list[int]:
        words = vllm_sampling(self._eos, place, **sampling)
        known = {name: words.pop(name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
        output = self._client.generate(prompts=[ids], logprobs=None, generation_kwargs=words, **known)
        return list(output["completion_ids"][0])


def _versions() -> dict[str, str]:
    import vllm

    installed = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    # Its build for CPUs has another name
    return {**installed, "vllm": vllm.__version__}
