# Tiny Shakespeare, byte by byte; config/shakespeare_bpe.py comes nearly as far in half the steps.
#
#     python prepare.py shakespeare --tokenizer=bytes --val=0.1 --test=0
#     python train.py config/shakespeare.py
#
# Expected result: validation loss 1.418 nats per byte (median of three seeds; docs/speed.md has
# what was tried). It should take three minutes of two quiet cores with fast bfloat16, by the time
# of a step; twice that on shared ones, and twelve where only AVX2 is there. A short run ends at
# 1.76 (seed 1):
#
#     python train.py config/shakespeare.py --out=out/seconds --steps=220 --block_size=64 \
#         --batch_tokens=1024 --lr=0.03 --head_lr=0.01 --decay=0.7 --weight_decay=0.05
#
# Canon layers have a price: no other program reads the weights, and a KV cache is twice as large.
# With --canon=0 --steps=1500 --weight_decay=0.05 the long run ends at 1.466, with --canon=0 the
# short one at 1.83, after twenty seconds.

data = "data/shakespeare"

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
canon = 4  # at equal steps 0.02 better, three seeds

steps = 2500
batch_tokens = 8 * 256
lr = 0.015
decay = 0.8
weight_decay = 0.2  # 0.05 is 0.02 worse: five epochs are enough to learn by heart
grad_clip = 0  # Muon and AdamW take steps of their own length, whatever the gradient's
eval_every = 2500
save_every = 500
log_every = 25
