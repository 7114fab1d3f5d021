# Handwritten digits, drawn pixel by pixel, as text: see tasks/digits.py. Needs scikit-learn.
#
#     python prepare.py digits --tokenizer=bytes --test=0.2
#     python train.py config/digits.py
#     python sample.py out/digits --grid=digits.png --temperature=1
#     python images.py out/digits
#
# Expected result: 1.77 bits per dimension on the test split, where counts need 2.43 or more; 97% of
# what it draws is recognised. A minute and a half of one core.

data = "data/digits"

block_size = 72  # markers, a label, 64 pixels, an end
n_layer = 3
n_head = 4
n_embd = 96
position = "learned"  # a picture has places
dropout = 0.1

steps = 350
batch_tokens = 32 * 72
lr = 0.01
embed_lr = 0.1
weight_decay = 0.1
eval_every = 70
save_every = 70
patience = 3
log_every = 50
sample_tokens = 80
