"""From text to batches: corpora, tokenizers, the Grain pipeline."""
