"""Model families described as configurations, one decoder, and the weight loader."""
