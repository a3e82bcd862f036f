"""HTTP and text: everything between a client's bytes and token ids."""
