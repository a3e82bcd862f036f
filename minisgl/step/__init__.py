"""What happens in every step: a `Batch` becomes tensors, logits, tokens. Decides no scheduling."""
