"""A ledger of a training step: its launches and the bytes that they move, counted without a GPU."""
