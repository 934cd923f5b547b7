"""Prints results, draws figures, and writes the page of results and runs. Does not import torch."""
