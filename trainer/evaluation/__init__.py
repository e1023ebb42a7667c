"""Metrics, intervals and reports from a scores Parquet of any program. Only `text_metrics` loads a model."""
