"""The loss as pure functions of tensors. Imports no trainer."""
