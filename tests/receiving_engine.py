"""An engine that stands where TRL's `VLLMGeneration` has vLLM: it takes the weights that are pushed, and samples with them."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import trl.generation.vllm_generation as generation_module
import trl.trainer.distillation_trainer as trainer_module
from trl.generation.vllm_generation import VLLMGeneration


class ReceivingEngine:
    """
    A real model that has its own parameters. A key that it does not have is an error, as is one that never comes.

    Attributes:
        pushes: What each push brought, by name.
        starts: How often it was started.
        resets: How often the prefix cache was reset.
        is_deaf: Whether what is pushed never reaches the model.
        seed: Of the tokens that are sampled after the first push; each push has the next.
        distort: Changes the logits, [B, V], with which the tokens are sampled; for an engine that is not the student.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model.eval()
        self.pushes: list[dict[str, torch.Tensor]] = []
        self.starts = self.resets = 0
        self.is_deaf = False
        self.seed = 0
        self.distort = lambda logits: logits
        self._open: dict[str, torch.Tensor] = {}
        # The path to vLLM's model that TRL goes
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=SimpleNamespace(max_model_len=4096))

    def load_weights(self, weights: Any) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            assert tensor.shape == parameters[name].shape, name
            assert name not in self._open, f"{name} came twice"
            self._open[name] = tensor.detach().clone()
            if not self.is_deaf:
                parameters[name].data.copy_(tensor)

    def reset_prefix_cache(self) -> None:
        assert self._open.keys() == dict(self.model.named_parameters()).keys()
        self.pushes.append(self._open)
        self._open = {}
        self.resets += 1

    def sleep(self, level: int) -> None:
        """Level 2 of vLLM discards the weights."""
        assert level == 2
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)

    def wake_up(self, tags: list[str]) -> None:
        """The weights come with the next push."""

    # TRL's client of a server

    def update_named_params(self, metadata: Any, named_parameters: Any) -> None:
        for (name, dtype, shape), (sent, tensor) in zip(metadata, named_parameters, strict=True):
            assert (name, dtype, shape) == (sent, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            self.load_weights([(sent, tensor)])

    def sample(self, prompts: Any, sampling: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        """Return token ids with their log-probabilities in the distribution that is sampled from."""
        generator = torch.Generator().manual_seed(self.seed + len(self.pushes))
        rows = []
        for prompt in prompts:
            ids: list[int] = []
            values: list[float] = []
            while len(ids) < sampling["max_tokens"]:
                with torch.no_grad():
                    logits_V = self.model(torch.tensor([[*prompt, *ids]])).logits[0, -1].float()
                logits_V = truncated(self.distort(logits_V) / sampling["temperature"], sampling)
                log_probs_V = logits_V.log_softmax(dim=-1)
                ids.append(int(torch.multinomial(log_probs_V.exp(), 1, generator=generator)))
                values.append(log_probs_V[ids[-1]].item())
                if ids[-1] == self.model.config.eos_token_id:
                    break
            rows.append((ids, values))
        return rows

    def generate(self, prompts: Any, sampling_params: Any = None, features: Any = None, **sampling: Any) -> Any:
        """Colocated it is called as vLLM's `LLM.generate`, and as a server's client as `VLLMClient.generate`."""
        if sampling_params is not None:
            rows = self.sample([prompt["prompt_token_ids"] for prompt in prompts], vars(sampling_params))
            wants = sampling_params.logprobs is not None
            return [
                SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[_output(*row, wants)])
                for prompt, row in zip(prompts, rows, strict=True)
            ]
        sampling = {**sampling, **sampling["generation_kwargs"]}
        rows = self.sample(prompts, sampling)
        wants = sampling["logprobs"] is not None
        return {
            "prompt_ids": prompts,
            "completion_ids": [ids for ids, _ in rows],
            "logprobs": [[[value] for value in values] for _, values in rows] if wants else None,
            "logprob_token_ids": [[[token] for token in ids] for ids, _ in rows] if wants else None,
        }


def truncated(logits_V: torch.Tensor, sampling: dict[str, Any]) -> torch.Tensor:
    """Leave out tokens by min_p, top_k and top_p, one number at a time."""
    log_probs = logits_V.log_softmax(dim=-1).tolist()
    order = sorted(range(len(log_probs)), key=lambda token: -log_probs[token])
    probabilities = torch.tensor(log_probs).double().exp().tolist()
    kept = [t for t in order if probabilities[t] >= (sampling.get("min_p") or 0.0) * probabilities[order[0]]]
    if sampling.get("top_k", 0) > 0:
        kept = kept[: sampling["top_k"]]
    mass, total, nucleus = 0.0, sum(probabilities[t] for t in kept), []
    for token in kept:
        if sampling.get("top_p", 1.0) < 1 and mass >= sampling["top_p"] * total:
            break
        nucleus.append(token)
        mass += probabilities[token]
    left = torch.full_like(logits_V, -torch.inf)
    left[nucleus] = logits_V[nucleus]
    return left


def _output(ids: list[int], values: list[float], wants_log_probs: bool) -> SimpleNamespace:
    log_probs = [{token: SimpleNamespace(logprob=value, rank=1)} for token, value in zip(ids, values, strict=True)]
    return SimpleNamespace(token_ids=ids, logprobs=log_probs if wants_log_probs else None)


@contextmanager
def receiving(engine: ReceivingEngine, monkeypatch: Any) -> Any:
    """Put the engine in vLLM's place for the trainers made inside."""

    def start(generation: VLLMGeneration) -> None:
        engine.starts += 1
        if generation.mode == "colocate":
            generation.llm = engine
            generation._llm_weights_sleeping = generation.enable_sleep_mode
            if generation.enable_sleep_mode:
                engine.sleep(level=2)
        else:
            generation.vllm_client = engine

    with monkeypatch.context() as patch:
        for module in (generation_module, trainer_module):
            patch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True)
        patch.setattr(generation_module, "SamplingParams", SimpleNamespace, raising=False)
        patch.setattr(VLLMGeneration, "_init_vllm", start)
        yield engine


def engine_like(model: torch.nn.Module) -> ReceivingEngine:
    """Return an engine that has read the files of a student's base model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ReceivingEngine(copy.deepcopy(base))
