"""A laboratory for KV-cache compression: one transformer, four attentions behind one switch."""
