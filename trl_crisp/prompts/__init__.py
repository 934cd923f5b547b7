"""Student and teacher prompts, the instructions, and the count of thinking tokens. Does not import trl_crisp.trainer."""
