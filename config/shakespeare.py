# Tiny Shakespeare, byte by byte, as well as two CPU cores can in three minutes.
#
#     python prepare.py shakespeare --tokenizer=bytes --val=0.1 --test=0
#     python train.py config/shakespeare.py
#
# Expected result: validation loss 1.470 nats per byte, in three minutes or a little more on two CPU
# cores with fast bfloat16.

data = "data/shakespeare"

block_size = 128
n_layer = 4
n_head = 4
n_embd = 128

steps = 1900
batch_tokens = 16 * 128
lr = 0.015
decay = 0.8
grad_clip = 0
eval_every = 950
save_every = 950
log_every = 25
