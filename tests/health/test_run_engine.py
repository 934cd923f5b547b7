"""Which engine answers along a run, what fits into it, and which process draws which answers."""

from types import SimpleNamespace

import pytest

from trl_crisp.evaluation.engines import PaceTeller, vllm_sampling
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.sample_problems import all_draws
from trl_crisp.health.run_engine import ServerEngine, can_answer, check_lengths, engine_name, run_engine


class Engine:
    """Notes what it is told, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


def vllm_trainer(process=0, processes=1, mode="colocate", sleeps=False, shared_by=1, longest=100):
    engine = Engine()
    engine.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
    generation = SimpleNamespace(
        mode=mode,
        llm=engine,
        vllm_client=engine,
        enable_sleep_mode=sleeps,
        tensor_parallel_size=shared_by,
        sync_weights=lambda: engine.calls.append(("sync",)),
        _llm_weights_sleeping=False,
    )
    config = SimpleNamespace(max_position_embeddings=10_000)
    config.get_text_config = lambda: config
    return SimpleNamespace(
        use_vllm=True,
        vllm_mode=mode,
        vllm_generation=generation,
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(process_index=process, num_processes=processes, is_main_process=process == 0),
        state=SimpleNamespace(global_step=7),
        model=SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=[3, 2])),
        _last_loaded_step=6,
    )


@pytest.mark.parametrize(("mode", "shared_by"), [("colocate", 1), ("colocate", 2), ("colocate", 4), ("server", 1)])
def test_each_answer_is_kept_once_and_each_group_draws_the_same(mode, shared_by):
    draws, kept, drawn = all_draws(5, 3), [], []
    for process in range(4):
        with run_engine(vllm_trainer(process, 4, mode, shared_by=shared_by), None) as (_, share):
            mine = list(range(share.number, len(draws), share.of))
        drawn.append(mine)
        kept += mine if share.keeps else []
    assert sorted(kept) == list(range(len(draws)))
    if mode == "colocate":
        assert all(drawn[process] == drawn[process - process % shared_by] for process in range(4))


@pytest.mark.parametrize("sleeps", [False, True])
def test_the_engine_has_the_students_weights_and_sleeps_again(sleeps):
    trainer = vllm_trainer(sleeps=sleeps)
    engine = trainer.vllm_generation.llm
    with run_engine(trainer, None):
        assert engine.calls == [("sync",)] + ([("wake_up", ["kv_cache"])] if sleeps else [])
        assert trainer._last_loaded_step == 7
    assert engine.calls[-1] == (("sleep", 2) if sleeps else ("sync",))
    assert trainer.vllm_generation._llm_weights_sleeping is sleeps


def test_vllm_answers_under_fsdp_and_transformers_does_not():
    trainer = vllm_trainer()
    assert (can_answer(trainer), engine_name(trainer)) == (True, "vllm")
    trainer.use_vllm = False
    assert (can_answer(trainer), engine_name(trainer)) == (False, "transformers")


def test_what_does_not_fit_into_the_runs_vllm_is_refused():
    problems, prompts = [Problem("a", "?", ""), Problem("b", "?", "")], [[1] * 10, [1] * 31]
    check_lengths(vllm_trainer(longest=100), problems, prompts, 69, "monitor_max_new_tokens")
    with pytest.raises(ValueError, match=r"prompt has 31 .*monitor_max_new_tokens=70.*vllm_max_model_length to 101"):
        check_lengths(vllm_trainer(longest=100), problems, prompts, 70, "monitor_max_new_tokens")
    with pytest.raises(ValueError, match="10000"):
        check_lengths(vllm_trainer(mode="server"), problems, prompts, 10_000, "monitor_max_new_tokens")


class Client:
    """Answers as a server: with tokens that tell the prompt and the seed, the last request first."""

    def __init__(self):
        self.requests = []

    def generate(self, prompts, logprobs, generation_kwargs, **sampling):
        self.requests.append((*prompts[0], generation_kwargs["seed"]))
        assert logprobs is None
        assert (generation_kwargs["stop_token_ids"], generation_kwargs["ignore_eos"]) == ([2, 3], True)
        assert sampling == {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4}
        return {"completion_ids": [[*prompts[0], 3 if prompts[0][0] % 2 else 5]]}


def test_the_server_gets_one_request_with_its_own_seed_for_each_answer():
    client, found, notes = Client(), {}, []
    sampling = {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 1}
    ServerEngine(client, None, [2, 3]).generate(
        [[10], [11], [10]],
        [0, 1, 2],
        lambda index, completion: found.update({index: completion}),
        lambda *told: notes.append(told),
        **sampling,
        batch_size=None,
    )
    seeds = [vllm_sampling([2, 3], place, **sampling)["seed"] for place in range(3)]
    assert len(set(seeds)) == 3
    assert sorted(client.requests) == sorted(zip([10, 11, 10], seeds, strict=True))
    assert [(found[i].token_ids, found[i].ended_by_eos) for i in range(3)] == [
        ([10, 5], False),
        ([11, 3], True),
        ([10, 5], False),
    ]
    assert notes[-1][0] == 3


def test_a_process_without_a_client_asks_nothing():
    ServerEngine(None, None, [3]).generate([], [], None, None, batch_size=None)


def test_the_pace_is_told_at_the_end():
    notes = []
    teller = PaceTeller(2, lambda *told: notes.append(told))
    teller.add(30)
    teller.report()
    assert notes == []
    teller.add(50)
    teller.report()
    assert notes[0][0] == 2
    assert notes[0][1].endswith("tokens/s, about 0 s left")
