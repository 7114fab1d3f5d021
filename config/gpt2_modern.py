# The modern shape and recipe at GPT-2's size: 12 layers, width 768 (162M parameters, own head).
#
#     python prepare.py TEXT... --out=data/gpt2 --tokenizer=gpt2
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2_modern.py
#
# Expected result: the loss begins at ln 50257 = 10.82 exactly, since the head starts at zero; where
# it ends was not measured here.

data = "data/gpt2"

block_size = 1024
n_layer = 12
n_head = 6
n_embd = 768

steps = 10_000
batch_tokens = 512 * 1024
device_batch = 16
lr = 0.02
embed_lr = 0.3
head_lr = 0.004
decay = 0.6
eval_every = 1000
save_every = 1000
