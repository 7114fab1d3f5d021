# Tic-tac-toe, well played: a model that knows what a move is learns from its own which are sound.
#
#     python prepare.py tictactoe --tokenizer=bytes
#     python train.py config/tictactoe.py
#     python train.py config/player.py
#     python -m tasks.tictactoe out/player
#
# Expected result: 1 to 2% of the games lost, in seven minutes of a core (docs/objectives.md). The
# shape is that of out/tictactoe, canon layers and all.

data = "data/tictactoe"
init_from = "out/tictactoe"
objective = "reward"
reward = "tasks.tictactoe:sound"

group = 8  # moves to each of 128 beginnings; those that are alike are learned from once
inner = 1
max_tokens = 4

block_size = 32
n_layer = 3
n_head = 4
n_embd = 64

# as many beginnings as possible: each says little, and there are 4,500 boards
steps = 1000
batch_tokens = 128 * 32
lr = 0.02
embed_lr = 0.1
head_lr = 0.004
warmup = 10
eval_every = 250
save_every = 250
log_every = 25
sample_tokens = 4
