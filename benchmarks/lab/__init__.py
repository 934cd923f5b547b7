"""A task, a language and a model small enough to see CRISP's effect on accuracy and length in minutes on a laptop."""
