# Translation: one model for both directions, the marker says which.
#
#     python prepare.py "pairs.tsv --prompt=english --answer=german --task=german --group=english" \
#         "pairs.tsv --prompt=german --answer=english --task=english --group=english" \
#         --vocab_size=6000 --out=data/pairs
#     python train.py config/translate.py --data=data/pairs
#     python evaluate.py out/translate --split=test --beam=4
#     python sample.py out/translate --task=german --prompt="A dog runs."
#
# The prompt is read whole (prefix), as the encoder of a Transformer does; dropout and smoothed
# targets, since some ten thousand pairs are seen many times. What came of it: docs/tasks.md.

data = "data/pairs"

mask = "prefix"
canon = 4  # 1.6 and 2.4 BLEU more (one seed), in the same processor time
block_size = 128
n_layer = 4
n_head = 5
n_embd = 160
dropout = 0.2
label_smoothing = 0.1

steps = 1500
batch_tokens = 32 * 128
lr = 0.01
embed_lr = 0.1
weight_decay = 0.1
eval_every = 250
save_every = 250
log_every = 50
sample_tokens = 40
