# Numbers below a million, translated among English words, digits and Chinese: see tasks/numbers.py.
#
#     python prepare.py numbers --vocab_size=512
#     python train.py config/numbers.py
#     python evaluate.py out/numbers --split=test
#
# Six directions in one model; the marker alone says which form is wanted.

data = "data/numbers"

block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

steps = 1500
batch_tokens = 32 * 128
eval_every = 500
save_every = 500
log_every = 50
sample_tokens = 40
