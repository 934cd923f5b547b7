"""Loads rows from the Hub, a file or a task, and makes prompts of them. Does not import trl_crisp.trainer."""
