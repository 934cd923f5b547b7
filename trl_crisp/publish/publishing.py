"""A trainer whose model card and push carry the evidence of its training. What they need is imported when they are called."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from trl_crisp.run.resumable import ResumableTrainer


class PublishingTrainer(ResumableTrainer):
    """
    A [`~trl_crisp.run.resumable.ResumableTrainer`] that writes and pushes a model card of its own.

    What differs from its parent:

    - The card says what was trained, from what, how and with what results ([`~trl_crisp.publish.run_card`]). It is written when the model
      beside it is, and each checkpoint has a record of its own. While output_dir has no model yet, each checkpoint writes it anew.
    - A push has the model, the tokenizer, the card, the results and the report, and nothing else of output_dir
      ([`~trl_crisp.publish.folder`]). Pushes during training have the model, the tokenizer and the card; `hub_strategy` "checkpoint" and
      "all_checkpoints" also what a resume needs, with the monitor prompts.

    Attributes:
        origin: What the model comes from ([`~trl_crisp.models.origin.describe_origin`]); a subclass sets it.
        dataset_name: The Hub id or the name of the rows, for the card.
    """

    origin: dict[str, Any]
    dataset_name: str | None = None
    _is_saving_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        own = Path(self.args.output_dir or ".")
        if Path(output_dir or own).absolute() == own.absolute():
            # What the card of an earlier model says is not true of this one. And PEFT has written one, with the path of the base
            self.create_model_card()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._is_saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving_checkpoint = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            from trl_crisp.publish.run_card import make_record
            from trl_crisp.run.training_record import write_record

            write_record(output_dir, make_record(self, self.dataset_name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        from trl_crisp.publish.folder import files_while_training
        from trl_crisp.publish.pushing import uploading_only

        resumable = self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        with uploading_only(files_while_training(self.run_id, resumable)):
            super()._push_from_checkpoint(checkpoint_folder)

    def _keeps_card(self) -> bool:
        """Whether output_dir has a model with a card, to which this checkpoint is no part."""
        from trl_crisp.publish.folder import has_model

        is_uploaded = self.may_upload is None or self.may_upload()
        is_copied = self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END and is_uploaded
        return self._is_saving_checkpoint and not is_copied and has_model(Path(self.args.output_dir or "."))

    # As in TRL, whose signature is not transformers'
    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: "str | list[str] | None" = None,
        results: Sequence[Sequence[str | Path]] = (),
    ) -> None:
        """
        Write the model card, README.md, and the record that it is made from, crisp_training.json, into output_dir.

        A subclass or a trainer that sets `_template_file` to one of TRL's templates, such as `"lm_model_card.md"`, gets TRL's card.

        Args:
            model_name: The model's name; that of output_dir if `None`.
            dataset_name: The Hub id or the name of the rows; `dataset_name` of the trainer if `None`.
            tags: More tags of the card.
            results: For each benchmark the results of `trl-crisp eval`: the base's first, then, if it was measured, that of the base told to be
                concise, and the model's own. If there are none, what the training measured.

        Raises:
            FileNotFoundError, ValueError: If results do not exist, cannot be compared, or are of another model than the saved one.
        """
        if self._template_file is not None:
            return super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero() and not self._keeps_card():
            from trl_crisp.publish.run_card import write_run_card

            more = [tags] if isinstance(tags, str) else tags or []
            write_run_card(self, model_name, dataset_name or self.dataset_name, more, results)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save the model and push it as `trl-crisp push` does: with tokenizer, card, results and report, and nothing else of output_dir.

        Args:
            commit_message, blocking, token, revision, private: As in the parent.
            kwargs: Arguments of [`create_model_card`].
        """
        from trl_crisp.publish.folder import make_folder
        from trl_crisp.publish.pushing import push_folder

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.save_state()
        if not self.is_world_process_zero():
            return None
        assert self.hub_model_id is not None  # init_hf_repo sets it
        kwargs.setdefault("model_name", self.hub_model_id.split("/")[-1])
        self.create_model_card(**kwargs)
        self._finish_current_push()
        # A card of TRL's templates or of a subclass is pushed as it is
        is_others = self._template_file is not None or (
            type(self).create_model_card is not PublishingTrainer.create_model_card
        )
        results = [[Path(path) for path in group] for group in kwargs.get("results", ())]
        folder = make_folder(Path(self.args.output_dir or "."), self.hub_model_id, results, keeps_card=is_others)
        return push_folder(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=commit_message,
            run_as_future=not blocking,
        )
