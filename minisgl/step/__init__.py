"""Every step: from a `Batch` to tensors to logits to tokens. Decides nothing about scheduling."""
