"""A config's fields by their dotted names. Imports no JAX, as --help and flags shall not wait."""

import difflib
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from mla.errors import UserError


def field(config: ConfigDict, name: str):
  """The value of a dotted field name."""
  value = config
  for part in name.split('.'):
    if not isinstance(value, ConfigDict) or part not in value:
      raise UserError(f'{name}: the config lacks this field; see configs/base.py')
    value = value[part]
  return value


def unknown_field(name: str, known: Iterable[str]) -> UserError:
  """The error for a field that does not exist."""
  close = difflib.get_close_matches(name, known, n=1)
  hint = f'did you mean {close[0]}?' if close else 'see configs/base.py for those there are'
  return UserError(f'{name}: no such field; {hint}')


def flatten(config: ConfigDict) -> dict[str, Any]:
  """The fields by their dotted names."""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      flat.update({f'{name}.{key}': item for key, item in value.items()})
    else:
      flat[name] = value
  return flat
