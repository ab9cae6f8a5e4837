"""What compares runs: trials of a sweep, their results, intervals over seeds, the report of them.

Imports run downwards here as well:

  ray_engine.py     trials on a Ray cluster; restarts.py tells crashes from preemptions
  page/             report.html
  report.py         report.md and frontier.png; sections.py its tables
  joined.py         runs that the sweep did not train, as arms of its report
  run.py            runs trials one after another, keeps their results, does nothing twice
  frontier.py       from results to arms, frontier and sweet spot; recall.py: a probe's accuracy
  tuning.py, looks.py, statistics.py
  results.py        a sweep's lines on disk, found by their config; widths.py: nested ones'
  watch.py          how far running trials are
  dry_sweep.py      what all trials need on a named machine
  trials.py         axes and named arms, checked
"""
