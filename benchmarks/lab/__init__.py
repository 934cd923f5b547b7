"""A task, a language and a model that are small enough to show CRISP's effect on accuracy and length in minutes on a laptop."""
