# Rows: questions with answers, texts with labels, sentences with translations. A first try.
#
#     python prepare.py questions.csv --prompt=question --answer=answer --out=data/questions
#     python train.py config/rows.py --data=data/questions --out=out/questions
#     python sample.py out/questions --chat
#
# A few thousand rows are learned by heart long before they are understood: hence dropout, and an
# end as soon as three evaluations in a row were no better than the best, which is kept. Weights
# that have read text of the same language know more to begin with: prepare.py
# --tokenizer=out/small, train.py --init_from=out/small. What came of it: docs/tasks.md.

data = "data/rows"

block_size = 256
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.1

steps = 1500
batch_tokens = 16 * 256
lr = 0.01
embed_lr = 0.1
weight_decay = 0.1
eval_every = 100
save_every = 100
patience = 3
sample_tokens = 50
