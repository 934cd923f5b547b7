"""Both prompts of a row: the instructions, the teacher's prompt, and what is thinking in a completion. Imports no trainer."""
