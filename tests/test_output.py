"""What is printed never ends a run, whatever becomes of the place it is printed to."""

import os

import pytest

from mla.cli import _Outlet


def full() -> int:
  return os.open('/dev/full', os.O_WRONLY)


def left() -> int:
  reader, writer = os.pipe()
  os.close(reader)
  return writer


def gone() -> int:
  master, slave = os.openpty()
  os.close(master)
  return slave


@pytest.mark.parametrize('place', [full, left, gone], ids=['full', 'left', 'gone'])
def test_a_place_that_takes_nothing_is_written_to_all_the_same(place):
  with _Outlet(place(), 'w') as outlet:
    assert outlet.write(b'a line\n') == outlet.write(b'a line\n') == 7


def test_what_nobody_expects_is_raised():
  with _Outlet(os.open('/dev/null', os.O_WRONLY), 'w') as outlet:
    os.dup2(os.open('/dev/null', os.O_RDONLY), outlet.fileno())
    with pytest.raises(OSError, match='Bad file descriptor'):
      outlet.write(b'a line\n')
