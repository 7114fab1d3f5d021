# Stories of who is where, and a question: see tasks/facts.py.
#
#     python prepare.py facts --vocab_size=512
#     python train.py config/facts.py
#     python evaluate.py out/facts --split=test
#
# Expected result: 99.9% of 1,000 unseen stories (docs/tasks.md), in forty minutes of one busy core.

data = "data/facts"

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
canon = 4  # to look something up, a place has to know what stands before it: docs/tasks.md

steps = 2000
batch_tokens = 16 * 256
lr = 0.01
eval_every = 500
save_every = 500
log_every = 50
sample_tokens = 10
