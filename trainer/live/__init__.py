"""Live decoding: a batched KV cache, continuous batching of sessions, free-running rollouts and streams."""
