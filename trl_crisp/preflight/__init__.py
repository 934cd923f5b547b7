"""Measures before training what an instruction does to a model: how much shorter, and whether the answers stay the same."""
