"""Campaigns: the same thing tried hundreds or thousands of times, seeded, and every outcome counted.

A campaign is a module of this folder that has

* ``TRIED``: one or two plain sentences for the page: what is tried, and how an outcome is judged;
* ``SHORT`` and ``LONG``: a ``Budget`` each, of tries and seconds. The short form runs in ``make test`` (a minute at most on a
  slow core), the long ones together in ``make campaign`` (an hour at most on two cores, so about 10 minutes each);
* ``run(budget, seed) -> Counts``: the campaign. The same seed and number of tries give the same tries.

>>> def run(budget: Budget, seed: int) -> Counts:                              # doctest: +SKIP
...     counts = Counts()
...     for i in budget.tries_left():                                          # stops when the seconds are over
...         chooses = random.Random(f"{seed}:{i}")
...         counts.add("right" if something(chooses) else "silent", f"try {i}: what was done")
...     return counts

Outcomes are short plain words. Those of ``counts.FAILURES`` (``silent``, ``wrong exception`` …) must never occur; any other is
fine (``right``, ``refused``, ``resumed``, ``healed`` …). ``add``'s second argument says how to do it again: examples of
failures are in the report.

``python -m tests.campaigns`` runs campaigns, each in a process of its own, so that a crash or a hang is counted and not the end:

* ``--short`` with ``--only NAME``: one campaign's short form, its counts on the screen;
* ``--out docs/reliability.md``: the long forms, two at once, and the page's table. Results are in ``build/campaign/NAME.json``; a
  campaign whose result is of the same code, seed and budget is not run again, so that an interrupted ``make campaign`` continues.

Each has its test: ``tests/campaigns/test_NAME.py`` is two lines:

>>> from tests.campaigns.short import check_short                              # doctest: +SKIP
>>> def test_no_interrupt_leaves_anything_behind():                            # doctest: +SKIP
...     check_short("interrupts")

``check_short`` runs the short form in a process without the type checks of ``conftest``, and fails when a failure is counted, or
nothing.
"""
