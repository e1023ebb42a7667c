"""Metrics, intervals and reports from a scores Parquet of any program. No model is loaded here."""
