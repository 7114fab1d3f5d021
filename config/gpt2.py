# GPT-2, the smallest of the four published sizes (124M parameters), in its own shape and recipe.
#
#     python prepare.py TEXT... --out=data/gpt2 --tokenizer=gpt2
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py
#
# Source: Radford et al. 2019 for the shape; Brown et al. 2020 (arXiv:2005.14165) for the recipe.
# Expected result: the loss begins near ln 50257 = 10.82. 20,000 steps are about ten billion tokens,
# for which one wants several GPUs; where it ends depends on the text, and was not measured here.

data = "data/gpt2"

block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
position = "learned"
norm = "layer"
norm_weight = True
norm_eps = 1e-5
embed_norm = False
qk_norm = False
mlp = "gelu"
bias = True
tied = True
logit_cap = 0
zero_init = False

steps = 20_000
batch_tokens = 512 * 1024
device_batch = 16
optimizer = "adamw"
lr = 6e-4
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
schedule = "cosine"
warmup = 700
decay = 1
final_lr = 0.1
eval_every = 1000
save_every = 1000
