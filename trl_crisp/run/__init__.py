"""Checkpoints, resuming, interruption and skipped steps: what makes a run repeatable. Does not import trl_crisp.trainer."""
