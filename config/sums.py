# Addition of up to three digits, the answer written from its lowest digit: see tasks/sums.py.
#
#     python prepare.py sums --tokenizer=bytes
#     python train.py config/sums.py
#     python evaluate.py out/sums --split=test
#
# Expected result: all 1,000 sums of the test right (docs/tasks.md), in five minutes on two cores.

data = "data/sums"

block_size = 128
n_layer = 3
n_head = 4
n_embd = 128

steps = 1200
batch_tokens = 16 * 128
eval_every = 300
save_every = 300
log_every = 50
sample_tokens = 10
