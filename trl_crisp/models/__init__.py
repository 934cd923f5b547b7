"""Checks of the model: can it be loaded, are its files whole, can this package train it. Does not import trl_crisp.trainer."""
