"""What can refuse a resume before the run takes over its output_dir."""

from transformers import TrainerCallback, TrainerState


class ChecksResume(TrainerCallback):
    """A callback without whose own files a run cannot go on. A resume that it refuses leaves `output_dir` as it is."""

    def check_resume(self, run_id: str | None, state: TrainerState) -> None:
        """
        Check that a run can go on from a checkpoint. The first process calls it, before `on_train_begin`; it writes nothing.

        Args:
            run_id: The run's, which the trainer does not have yet.
            state: That of the checkpoint.

        Raises:
            FileNotFoundError: If a file that the run needs is not there.
            ValueError: If the run cannot go on for another reason.
        """
        raise NotImplementedError
