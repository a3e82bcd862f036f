"""The pure floor: requests, pages, the radix tree and the scheduler. No torch, no tensors."""
