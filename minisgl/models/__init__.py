"""Model families described as configuration facts, one decoder, and the weight loader."""
