"""The one file that imports TRL's private names; tests/test_upstream_contract.py pins what we rely on.

Tested with TRL 1.16.0 (pyproject.toml allows 1.16 only). Besides the names below, `CRISPTrainer` overrides or calls these
private members of `DistillationTrainer`: `_compute_loss`, `_generate_and_score_completions`, `_prepare_inputs`,
`_get_last_hidden_state`, `_tokenize_prompts`, `_get_train_sampler`, `_forward_redirection`, `_metrics`, `_step`, `_tokenizer`,
`_is_vlm`, `_buffered_inputs`, `_last_loaded_step`. Of TRL's `VLLMGeneration` it replaces `_iter_named_params` and wraps `generate`, and
answers along a run use `_llm_weights_sleeping`. For its loaders, checkpoints and steps it also uses these members of transformers'
`Trainer`: `_get_dataloader`, `_eval_dataloaders`, `_run_epoch`, `_save_checkpoint`, `_save_optimizer_and_scheduler`, `_save_rng_state`,
`_load_optimizer_and_scheduler`, `_get_output_dir`, `_tr_loss`, `_globalstep_last_logged`, `_load_best_model`. For its card and its push it
uses `_template_file`, `_finish_current_push` and `_push_from_checkpoint`;
health/alerts.py uses `_wandb` and `_trackio` of transformers' callbacks.
"""

from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.models.utils import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url, maybe_gather_lm_head_ctx, pad

__all__ = [
    "ChunkedDivergenceFunction",
    "get_comet_experiment_url",
    "get_trackio_space_url",
    "maybe_gather_lm_head_ctx",
    "pad",
    "prepare_deepspeed",
    "prepare_fsdp",
    "unwrap_model_for_generation",
]
