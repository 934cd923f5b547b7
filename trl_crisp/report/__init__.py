"""Prints results and draws figures. Does not import torch."""
