"""Pictures. Each function draws on a figure of its own, lays it out, and then places its labels.

Nothing is left to chance: a label goes where no other text is, or is not drawn and the picture says
so (labels.py); a variant's name, colour and marker come from one table (styles.py).
"""

from mla.plots.compressed import compressed
from mla.plots.costs import bars, cache_memory, stacks
from mla.plots.cuts import cuts
from mla.plots.diagrams import absorption
from mla.plots.insides import attention_maps, by_position, dtypes, int8_parts, spectra
from mla.plots.losses import equal_bytes, frontier, latent_knob, perplexity
from mla.plots.recalls import caches, knees, recall
from mla.plots.styles import save, style

__all__ = [
  'absorption', 'attention_maps', 'bars', 'by_position', 'cache_memory', 'caches', 'compressed',
  'cuts', 'dtypes', 'equal_bytes', 'frontier', 'int8_parts', 'knees', 'latent_knob', 'perplexity',
  'recall', 'save', 'spectra', 'stacks', 'style',
]  # fmt: skip
