"""Rows: from the Hub, a file or a task to prompts. Imports no trainer."""
