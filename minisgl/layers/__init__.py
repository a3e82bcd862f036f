"""Building blocks of a decoder. No global state: everything a forward pass needs is passed in."""
