"""The Ray engine gives the losses of the local one; an address without a cluster is refused."""

import json
import subprocess
from pathlib import Path

import pytest
import test_sweep

ray = pytest.importorskip('ray')
import jsonschema  # noqa: E402  (Ray brings both)
import yaml  # noqa: E402

text = test_sweep.text


def test_both_engines_give_the_same_losses(text, tmp_path):
  for engine in ('local', 'ray'):
    done = test_sweep.run(tmp_path / engine, text, *test_sweep.AXES, f'--engine={engine}')
    assert done.returncode == 0, done.stderr
  assert len(test_sweep.losses(tmp_path / 'ray')) == 4
  assert test_sweep.losses(tmp_path / 'ray') == test_sweep.losses(tmp_path / 'local')


def test_the_cloud_cluster_file_keeps_rays_schema():
  schema = Path(ray.__file__).parent / 'autoscaler' / 'ray-schema.json'
  cluster = yaml.safe_load((test_sweep.ROOT / 'docs' / 'cluster-tpu.yaml').read_text())
  jsonschema.validate(cluster, json.loads(schema.read_text()))
  assert cluster['head_node_type'] in cluster['available_node_types']


def test_no_cluster_at_the_address(text, tmp_path):
  done = subprocess.run(
    test_sweep.command(
      tmp_path / 'sweep', text, *test_sweep.AXES, '--engine=ray', '--address=127.0.0.1:1'
    ),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert '--address=127.0.0.1:1' in done.stderr.splitlines()[-1]
