"""Measuring a model: sampled answers and what is counted in them. Imports no trainer."""
