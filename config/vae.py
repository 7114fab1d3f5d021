# A variational autoencoder of sentences, a line each: captions, headlines, questions.
#
#     python prepare.py captions.txt --lines=true --vocab_size=3000 --out=data/captions
#     python train.py config/vae.py --data=data/captions
#     python -m objectives.vae out/vae --report --split=test
#     python -m objectives.vae out/vae --between="a dog in the grass" --and="a red bus"
#
# Expected result, with 8,881 captions of COCO to learn from: -ELBO 46.9 nats a caption of the
# validation split, of which 4.6 are KL, and 32 active units; docs/objectives.md has more. That
# block_size is only the longest line that is read whole: a batch is as wide as its own longest,
# and has 64 lines. A few thousand lines are soon known by heart: hence dropout, and the best
# checkpoint is the one that counts. More lines bear more of n_layer, n_embd and steps.

objective = "vae"

block_size = 128
n_layer = 2
n_head = 4
n_embd = 96
dropout = 0.2

steps = 1200
batch_tokens = 64 * 128
lr = 0.01
embed_lr = 0.1
weight_decay = 0.1
eval_every = 200
save_every = 200
