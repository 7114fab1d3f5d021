# nanoGPT's documented recipe for a CPU, in our loop: a baseline for this house, and a check of it.
#
#     python prepare.py shakespeare --tokenizer=bytes --val=0.1 --test=0
#     python train.py config/nanogpt_cpu.py
#
# Source: README of github.com/karpathy/nanoGPT. Expected result: nanoGPT's own checkpoint of this
# recipe scores 1.898 on the whole validation tenth, ours 1.890.

data = "data/shakespeare"

block_size = 64
n_layer = 4
n_head = 4
n_embd = 128
position = "learned"
norm = "layer"
norm_weight = True
norm_eps = 1e-5
embed_norm = False
qk_norm = False
mlp = "gelu"
tied = True
logit_cap = 0
zero_init = False

steps = 2000
batch_tokens = 12 * 64
optimizer = "adamw"
lr = 1e-3
beta1 = 0.9
beta2 = 0.99
weight_decay = 0.1
schedule = "cosine"
warmup = 100
decay = 1
final_lr = 0.1
dtype = "float32"
eval_every = 500
save_every = 500
