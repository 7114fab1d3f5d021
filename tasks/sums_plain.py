"""The sums of tasks/sums.py, the answer written plainly: 57+68= gives 125."""

from functools import partial

from tasks import sums

rows = partial(sums.rows, task="sums_plain")
right = partial(sums.right, task="sums_plain")
