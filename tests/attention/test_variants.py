"""What the variants say of themselves, against the papers and against what they build."""

import pytest
from conftest import ARMS, tiny_config

from configs import base
from mla import config as config_lib
from mla.attention import VARIANTS
from mla.errors import UserError

# DeepSeek-V2 (arXiv 2405.04434), table 1, with V for a value's size: vectors, and elements in all.
PAPERS = {
  'mha': (8, 4 * (6 + 10)),
  'gqa': (4, 2 * (6 + 10)),
  'mqa': (2, 6 + 10),
  'mla': (2, 14 + 4),
}


@pytest.mark.parametrize('variant', PAPERS)
def test_what_is_kept_is_the_papers(variant):
  vectors = VARIANTS[variant].vectors(tiny_config(variant))
  assert (len(vectors), sum(vectors)) == PAPERS[variant]


def test_every_variant_has_an_arm():
  assert {fields['attention'] for fields in ARMS.values()} == set(VARIANTS)


def test_a_field_of_one_variant_alone_is_missed_by_no_other(monkeypatch):
  """It stands in that variant's config only, and is checked there."""
  own = VARIANTS['mqa']._replace(fields=('rope_dim', 'sinks'))
  monkeypatch.setitem(VARIANTS, 'sunk', own)
  monkeypatch.setattr(config_lib, 'OF_VARIANTS', (*config_lib.OF_VARIANTS, 'sinks'))
  monkeypatch.setattr(config_lib, 'FIELDS', {*config_lib.FIELDS, 'sinks'})
  config = base.get_config()
  config_lib.validate(config)
  config.attention = 'sunk'
  with pytest.raises(UserError, match='sinks: the config lacks this field'):
    config_lib.validate(config)
  config.sinks = -1
  with pytest.raises(UserError, match='sinks=-1: must be 0 or a positive integer'):
    config_lib.validate(config)
  config.sinks = 4
  config_lib.validate(config)
