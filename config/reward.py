data = "data/sums"
init_from = "out/half"
objective = "reward"

block_size = 32
n_layer = 3
n_head = 4
n_embd = 128

group = 16
inner = 2

steps = 200
batch_tokens = 16 * 32  # 16 questions
lr = 0.002
embed_lr = 0.03
head_lr = 0.0004
momentum = 0.9
decay = 0.5
eval_every = 50
save_every = 50
log_every = 10
sample_tokens = 10
