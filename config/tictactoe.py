# Tic-tac-toe, from the moves of random games: see tasks/tictactoe.py.
#
#     python prepare.py tictactoe --tokenizer=bytes
#     python train.py config/tictactoe.py
#     python evaluate.py out/tictactoe --split=test
#     python -m tasks.tictactoe out/tictactoe

data = "data/tictactoe"

block_size = 64
n_layer = 3
n_head = 4
n_embd = 64
canon = 4  # what a move is needs none; sound moves, if shown, are found by 89% with it, 70% without

steps = 400
batch_tokens = 32 * 64
eval_every = 200
save_every = 200
log_every = 50
sample_tokens = 4
