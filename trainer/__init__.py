"""A lean torch trainer: streams prospect-dst shards into SmolVLM with two direct decision heads."""
