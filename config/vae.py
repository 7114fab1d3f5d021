objective = "vae"

block_size = 32
n_layer = 2
n_head = 4
n_embd = 96
dropout = 0.2

steps = 1200
batch_tokens = 64 * 32
weight_decay = 0.1
lr = 0.01
embed_lr = 0.1
eval_every = 200
save_every = 200
patience = 0
