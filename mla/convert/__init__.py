"""Models in and out: the layouts of Hugging Face's transformers and of GGUF, both ways."""
