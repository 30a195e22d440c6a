"""The model, its texts, and its linears at every width."""
