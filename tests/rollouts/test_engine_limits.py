"""Prompts and rollouts that do not fit into vLLM's context are refused before the engine starts."""

from types import SimpleNamespace

import pytest
from transformers import MambaConfig

from tests.helpers import config, make_trainer
from tests.receiving_engine import engine_like, receiving
from tests.tiny_models import save_tiny, tiny_model
from trl_crisp.rollouts.engine_limits import check_engine_limits, context_limit_tokens

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is")

LENGTHS = {"max_prompt_length": 100, "max_completion_length": 28}


@pytest.mark.parametrize(("limit", "fits"), [(127, False), (128, True)])
def test_the_engines_own_limit(tmp_path, limit, fits):
    settings = {"use_vllm": True, "vllm_max_model_length": limit, **LENGTHS}
    if fits:
        config(tmp_path, **settings)
        return
    with pytest.raises(
        ValueError, match=r"vllm_max_model_length=127 is less than max_prompt_length=100 and .*Set it to 128"
    ):
        config(tmp_path, **settings)
    # A server has a limit of its own
    config(tmp_path, **settings, vllm_mode="server")


def test_without_a_limit_of_the_prompts_the_rollouts_count(tmp_path):
    settings = {"use_vllm": True, "max_prompt_length": None, "max_completion_length": 28}
    config(tmp_path, **settings, vllm_max_model_length=29)
    with pytest.raises(ValueError, match="Set it to 29"):
        config(tmp_path, **settings, vllm_max_model_length=28)


@pytest.mark.parametrize("given", ["model", "path"])
@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize(
    ("lengths", "lower"),
    [
        ({"max_prompt_length": 300, "max_completion_length": 213}, "max_completion_length to at most 212"),
        ({"max_prompt_length": 600, "max_completion_length": 8}, r"max_prompt_length\."),
    ],
)
def test_the_models_context(tmp_path, monkeypatch, given, mode, lengths, lower):
    model = tiny_model(max_position_embeddings=512)
    student = save_tiny(tmp_path / "model", max_position_embeddings=512) if given == "path" else model
    with (
        receiving(engine_like(model), monkeypatch) as engine,
        pytest.raises(ValueError, match=f"of 512 tokens.*Lower {lower}"),
    ):
        make_trainer(tmp_path, model=student, use_vllm=True, vllm_mode=mode, **lengths)
    assert engine.starts == 0
    # Rollouts by transformers have no such limit in their memory
    make_trainer(tmp_path, model=model, **lengths)


def test_a_context_that_suffices(tmp_path, monkeypatch):
    model = tiny_model(max_position_embeddings=512)
    with receiving(engine_like(model), monkeypatch) as engine:
        make_trainer(tmp_path, model=model, use_vllm=True, max_prompt_length=300, max_completion_length=212)
    assert engine.starts == 1


def test_an_engine_beyond_the_models_context(tmp_path, monkeypatch):
    model = tiny_model(max_position_embeddings=512)
    with (
        receiving(engine_like(model), monkeypatch) as engine,
        pytest.raises(ValueError, match="Set it to at most 512"),
    ):
        make_trainer(tmp_path, model=model, use_vllm=True, vllm_max_model_length=1024, **LENGTHS)
    assert engine.starts == 0


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 1024),
        # Those whose length in the config is the scaled one
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            },
            512,
        ),
    ],
)
def test_scaled_positions_reach_further(rope, expected):
    assert context_limit_tokens(tiny_model(max_position_embeddings=512, rope_parameters=rope).config) == expected


def test_a_config_without_a_length():
    model = SimpleNamespace(config=MambaConfig())
    assert context_limit_tokens(model.config) is None
    check_engine_limits(model, None, False, None, 1024, 1024)
    with pytest.raises(ValueError, match=r"vLLM assumes.* of 2048 tokens.*or set vllm_max_model_length"):
        check_engine_limits(model, None, False, None, 1024, 1025)
    check_engine_limits(model, None, False, 4096, 1024, 1025)
