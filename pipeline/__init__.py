"""Conversations -> Parquet shards of frame labels. Never imports torch; meets `trainer` only on disk."""
