# Tiny Shakespeare in 512 tokens that are learned first, of two bytes or so each: as well as two
# shared cores with fast bfloat16 can in three minutes (where only AVX2 is there it was not timed).
#
#     python prepare.py shakespeare --vocab_size=512 --val=0.1 --test=0 --out=data/shakespeare_bpe
#     python train.py config/shakespeare_bpe.py
#
# Expected result: 2.058 bits per byte of the validation text, 1.426 nats per byte (the median of
# three seeds, after 2 min 40 s on two shared cores with AMX). The loss itself is in nats a token,
# and of no use beside other vocabularies. nanoGPT's GPU recipe has 1.4697 after three minutes of an
# A100. Byte by byte, config/shakespeare.py has 1.43 after 2,000 steps: a batch of as many tokens
# holds half the text there. A short run ends at 2.485 bits, 1.722 nats, after nine seconds:
#
#     python train.py config/shakespeare_bpe.py --out=out/seconds --n_layer=2 --steps=120 \
#         --block_size=64 --batch_tokens=1024 --lr=0.03 --head_lr=0.02 --decay=0.7 \
#         --weight_decay=0.05

data = "data/shakespeare_bpe"

block_size = 128  # tokens, of about 256 bytes
n_layer = 4
n_head = 4
n_embd = 128
canon = 4  # its price is told in config/shakespeare.py

steps = 1200
batch_tokens = 16 * 128
lr = 0.02
decay = 0.8
weight_decay = 0.2  # read five times, a text is learned by heart
grad_clip = 0  # Muon and AdamW take steps of their own length, whatever the gradient's
eval_every = 1200
save_every = 400
log_every = 25
