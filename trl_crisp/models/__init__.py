"""Which model: can it be had, are its files whole, can this package train it. Imports no trainer."""
