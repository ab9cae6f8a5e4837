"""Eight of the arms of probes.py: enough to see where a knee lies; likewise used."""

from configs.sweeps import probes

FEW = 'mha mqa mla-c60 mla-c28 mla-c20 mla-c12 mla-c8 mla-c4'.split()


def get_arms():
  return {name: fields for name, fields in probes.get_arms().items() if name in FEW}
