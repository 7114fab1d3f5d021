# Masked tokens of Python's own library: see objectives/masked.py.
#
#     python train.py config/masked.py
#     python -m objectives.masked out/masked --fill="def add(a, b): return <mask> + b"
#     python train.py config/small.py --init_from=out/masked --out=out/warm
#
# The last takes the trunk as the beginning of a model that writes; docs/objectives.md says whether
# that saves steps.

objective = "masked"
data = "data/python"

tied = True
block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

steps = 1500
batch_tokens = 32 * 128
eval_every = 500
save_every = 500
log_every = 50
sample_tokens = 0
