# A model that answers learns which of two answers is better: see objectives/preference.py.
#
#     python prepare.py sums numbers --vocab_size=512 --out=data/tasks
#     python train.py config/numbers.py --data=data/tasks --mix=sums=0.5 --n_layer=3 \
#         --batch_tokens=2048 --steps=800 --eval_every=200 --save_every=200 --out=out/half
#
# and, stopped by Ctrl-C after 600 steps, three times (SPLIT is train, val and test)
#
#     python evaluate.py out/half --task=sums --split=SPLIT --temperature=1 --pairs=SPLIT.jsonl
#     python prepare.py train=train.jsonl val=val.jsonl test=test.jsonl --tokenizer=out/half \
#         --out=data/pairs
#     python train.py config/preference.py
#
# Expected result: docs/objectives.md.

data = "data/pairs"
init_from = "out/half"
objective = "preference"
likelihood = 1.0  # else both answers get less likely, and the right one is not written any more

block_size = 128
n_layer = 3
n_head = 4
n_embd = 128

steps = 300
batch_tokens = 64 * 128  # 64 pairs
optimizer = "adamw"  # small steps where the gradient is small: other tasks are to be kept
lr = 0.00025
eval_every = 50
save_every = 50
log_every = 50
sample_tokens = 10
