"""Fast parts agree with model.py, and are left out as soon as they do not."""

import inspect
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch
from test_model import BENDS, SHAPES, make, tokens
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import canon
import model as book
from engine import fast, gradients
from engine.machine import Machine
from model import GPTConfig

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.bfloat16)


def shape(name: str) -> GPTConfig:
    small = dict(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32)
    return GPTConfig(**small | SHAPES[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_all_parts_agree_with_the_book_as_it_is(name, dtype, training):
    new = ["mlp"] if name in BENDS else []  # somebody's own bend has no fast form
    wanted = [part for part in fast.PARTS if part not in new]
    assert fast.agreeing(shape(name), CPU, dtype, training) == wanted


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("name", ["modern", "llama", "gpt2"])
def test_a_norm_keeps_the_type_of_the_products(name, learns):
    """Whatever its weights have."""
    norm, x = fast.FastNorm(32, shape(name)), torch.randn(2, 24, 32).bfloat16()
    with warnings.catch_warnings(), torch.set_grad_enabled(learns):
        warnings.simplefilter("error")  # torch tells of a kernel that it cannot take
        assert norm(x).dtype == torch.bfloat16


def test_a_new_bend_is_left_to_the_book_and_the_log_says_so(monkeypatch, capsys):
    init = book.MLP.__init__

    def bent(self, config):
        init(self, config)
        self.activation = torch.tanh

    monkeypatch.setattr(book.MLP, "__init__", bent)
    model, here = make("modern"), Machine(CPU, torch.float32, False, rank=0, world=1, why="")
    fast.use(model, here, wanted=True)
    assert fast.installed(model) == [part for part in fast.PARTS if part not in ("mlp", "canon")]
    assert "mlp was changed, or has no fast form here" in capsys.readouterr().out


EDITS = {  # what a student may change: the class, the line, what becomes of it, the part
    "no 1/sqrt(D)": ("Attention", " / math.sqrt(D)", "", "attention"),
    "no mask": ("Attention", "scores.masked_fill(~mask, -math.inf)", "scores", "attention"),
    "no norm of queries": ("Attention", "self.q_norm(self.wq(x).view(B, T, H, D))",
                           "self.wq(x).view(B, T, H, D)", "attention"),
    "no norm of keys": ("Attention", "self.k_norm(self.wk(x).view(B, T, K, D))",
                        "self.wk(x).view(B, T, K, D)", "attention"),
    "no rotation": ("Attention", "q = rotate(q, rope)", "pass", "attention"),
    "a score more": ("Attention", "scores.softmax", "(scores + 0.1 * scores.tanh()).softmax",
                     "attention"),
    "each second layer sharper": ("Attention", " / math.sqrt(D)",
                                  " / math.sqrt(D) * (1 + self.layer % 2)", "attention"),
    "the last layer sharper": ("Attention", " / math.sqrt(D)",
                               " / math.sqrt(D) * (1 + self.layer // 2)", "attention"),
    "one layer without the mask": ("Attention", "if mask is None:",
                                   "if mask is None or self.layer == 2:", "attention"),
    "sharper where it writes": ("Attention", " / math.sqrt(D)",
                                " / math.sqrt(D) * (2 - self.training)", "attention"),
    "what a model cut down for comparison fails": ("Attention", "B, T, _ = x.shape",
        "B, T, _ = x.shape; assert self.config.n_layer > 1", "attention"),
    "values halved": ("Attention", "y = weights @ v", "y = weights @ v * 0.5", "attention"),
    "shares doubled": ("Canon", "share * before", "2 * share * before", "canon"),
    "another norm": ("Norm", "y.square().mean(", "y.abs().mean(", "norm"),
    "another constant": ("Norm", "+ self.eps", "+ 10 * self.eps", "norm"),
    "another bend": ("MLP", "self.activation(self.up(x))", "self.activation(1.1 * self.up(x))",
                     "mlp"),
    "another loss": ("Head.cross_entropy", "F.cross_entropy(logits,", "F.cross_entropy(2 * logits,",
                     "head"),
    "no cap": ("Head", "self.cap * torch.tanh(logits / self.cap)", "logits", "head"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("edit", EDITS)
def test_whoever_edits_the_book_is_obeyed(edit, dtype, monkeypatch):
    owner, old, new, part = EDITS[edit]
    owner, _, method = owner.partition(".")
    room = canon if owner == "Canon" else book
    kind, method = getattr(room, owner), method or "forward"
    source = textwrap.dedent(inspect.getsource(getattr(kind, method)))
    assert source.count(old) == 1
    names: dict = {}
    exec(source.replace(old, new), vars(room), names)
    monkeypatch.setattr(kind, method, names[method])
    # where nothing is learned, the fast MLP is that of the book
    for training in (True, False)[: 1 if part == "mlp" else 2]:
        agreeing = fast.agreeing(shape("modern"), CPU, dtype, training)
        assert part not in agreeing and len(agreeing) == len(fast.PARTS) - 1


@pytest.mark.parametrize("window, context", [(4, 128), (64, 128), (768, 1024)])
def test_whoever_lets_attention_see_less_far_is_obeyed(window, context, monkeypatch):
    whole = book.causal_mask
    near = lambda T, S, device=None: whole(T, S, device).triu(S - T - window + 1)  # noqa: E731
    monkeypatch.setattr(book, "causal_mask", near)
    config = replace(shape("modern"), block_size=context)
    for training in (True, False):
        assert "attention" not in fast.agreeing(config, CPU, torch.float32, training)


@pytest.mark.parametrize("window", ["600", "(100 if cache is None else S)"])
def test_whoever_lets_some_layers_see_less_far_is_obeyed(window, monkeypatch):
    source = textwrap.dedent(inspect.getsource(book.Attention.forward))
    line = "mask = causal_mask(T, k.size(2), x.device)"
    near = f"; S = k.size(2); mask = mask.triu(S - T - {window} + 1) if self.layer == 2 else mask"
    assert source.count(line) == 1
    names: dict = {}
    exec(source.replace(line, line + near), vars(book), names)
    monkeypatch.setattr(book.Attention, "forward", names["forward"])
    config = replace(shape("modern"), block_size=1024)
    assert "attention" not in fast.agreeing(config, CPU, torch.float32)
    assert "attention" in fast.agreeing(replace(config, n_layer=2), CPU, torch.float32)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.size = max(
            [
                self.size,
                *(z.numel() for z in pytree.tree_leaves(found) if isinstance(z, torch.Tensor)),
            ]
        )
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_whole_batch_never_stand_in_memory(dtype, monkeypatch):
    monkeypatch.setattr(gradients, "PIECE", 7 * 509)  # logits of seven rows between products
    error = 1e-5 if dtype == torch.float32 else 0.01
    plain, quick = make("modern", vocab_size=509), make("modern", vocab_size=509)
    fast.install(quick, ["head"])
    states = torch.randn(3, 70, 32, requires_grad=True)
    targets = torch.randint(509, (3, 70))
    targets[0, 60:] = targets[2, :51] = book.IGNORE
    for reduction, smoothing in (("sum", 0.0), ("mean", 0.1)):
        found = []
        for model in (plain, quick):
            with Largest() as largest, torch.autocast("cpu", dtype, dtype != torch.float32):
                loss = model.cross_entropy(states, targets, reduction, smoothing)
                for _ in range(2):  # a graph that is retained
                    grads = torch.autograd.grad(
                        loss * 3, (states, model.head.weight), retain_graph=True
                    )
            found.append((loss, *grads))
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= error * a.norm()
        assert largest.size == 32 * 509  # the weight; logits are of 149 targets, 30 and last 29
    quick.head.weight.requires_grad_(False)
    loss = quick.cross_entropy(states, torch.full_like(targets, book.IGNORE), "sum")
    (grad,) = torch.autograd.grad(loss, states)
    assert loss == 0 and not grad.any()


def test_a_new_weight_of_a_student_is_obeyed(monkeypatch):
    init, forward = book.Attention.__init__, book.Attention.forward

    def with_gate(self, config, layer):
        init(self, config, layer)
        self.gate = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(book.Attention, "__init__", with_gate)
    monkeypatch.setattr(
        book.Attention, "forward", lambda self, *more: forward(self, *more) * (1 + self.gate)
    )
    assert "attention" not in fast.agreeing(shape("modern"), CPU, torch.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_installing_keeps_the_names_and_the_function(name):
    model, x = make(name), tokens()
    names, logits = list(model.state_dict()), model(x)
    fast.install(model, fast.agreeing(model.config, CPU, torch.float32))
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), logits, atol=1e-4, rtol=1e-4)
    kinds = {type(module) for module in model.modules()}
    assert kinds >= {fast.FastEmbedding, fast.FastNorm, fast.FastAttention, fast.FastHead}


def test_layers_of_somebodys_own_are_called():
    model, x = make("modern"), tokens()
    fast.install(model, ["attention"])
    before = model(x)
    attention = model.blocks[0].attn
    handle = attention.wq.register_forward_hook(lambda layer, given, y: y * 3)
    assert not torch.allclose(model(x), before)
    handle.remove()
    torch.testing.assert_close(model(x), before)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    attention.wv.__class__ = Doubled
    assert not torch.allclose(model(x), before)


def test_dropout_falls_where_the_book_says():
    plain, quick = make("modern", dropout=0.5).train(), make("modern", dropout=0.5).train()
    fast.install(quick, ["attention"])
    for model in (plain, quick):
        torch.manual_seed(3)
        model.result = model(tokens())
    torch.testing.assert_close(plain.result, quick.result)


@pytest.mark.parametrize("name", ["modern", "qwen2"])
def test_a_context_too_long_for_plain_products_is_read_as_the_book_reads_it(name):
    length = fast.SHORT + 8
    model, x = make(name, n_layer=1, block_size=length), tokens(1, length)
    assert fast.agreeing(model.config, CPU, torch.float32) == list(fast.PARTS)
    with torch.no_grad():
        expected = model(x)
        fast.install(model, list(fast.PARTS))
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def made_quick(**changes):
    model = make("modern", n_layer=1, **changes).train()
    fast.install(model, list(fast.PARTS))
    return model


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("how", ["causal", "masked", "masked alike", "placed"])
def test_the_short_form_of_attention_is_that_of_the_book(how, n_kv_head):
    """Also where queries share keys, where positions are others, and twice through a graph."""
    x, more = tokens(2, 24), {}
    if "masked" in how:
        rows = torch.arange(24) // torch.tensor([[5], [9]])
        more["mask"] = (rows[:, :, None] == rows[:, None])[:, None] & book.causal_mask(24, 24)
        if "alike" in how:
            more["mask"] = more["mask"][0, 0]
    if how == "placed":
        more["positions"] = torch.stack([torch.arange(24), torch.arange(24).flip(0)])
    plain, quick = make("modern", n_layer=1, n_kv_head=n_kv_head), made_quick(n_kv_head=n_kv_head)
    found = []
    for model in (plain, quick):
        loss = model(x, x, **more)
        wanted = list(model.parameters())
        for _ in range(2):
            grads = torch.autograd.grad(loss, wanted, retain_graph=True)
        found.append((loss, *grads))
    assert took_short_form(found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def took_short_form(y: torch.Tensor) -> bool:
    """By the graph behind y."""
    found, new = set(), [y.grad_fn]
    while new:
        node = new.pop()
        if node is not None and node not in found:
            found.add(node)
            new += [before for before, _ in node.next_functions]
    return any(type(node).__name__ == "ShortAttentionBackward" for node in found)


def test_the_short_form_of_attention_is_taken_where_it_is_the_same():
    def taken(model, T=24, rope=True, dtype=torch.float32) -> bool:
        attention, x = model.blocks[0].attn, torch.randn(1, T, 32)
        turn = book.rotary(torch.arange(T), model.config) if rope else None
        with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            y = attention(x, turn, None, None)
        return took_short_form(y)

    long = dict(block_size=1024)
    assert taken(made_quick())
    assert taken(made_quick(**long), 256) and not taken(made_quick(**long), 257)
    assert taken(made_quick(**long), 512, dtype=torch.bfloat16)
    assert not taken(made_quick(**long), 513, dtype=torch.bfloat16)
    assert not taken(made_quick(), 1)
    assert not taken(made_quick(), rope=False)
    assert not taken(made_quick(norm="layer")) and not taken(made_quick(norm_weight=True))
    assert not taken(made_quick(qk_norm=False))
    for name in ("wq", "k_norm"):  # a hook is called
        model, calls = made_quick(), []
        layer = getattr(model.blocks[0].attn, name)
        layer.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        assert not taken(model) and calls
    model = made_quick()
    model.blocks[0].attn.q_norm.__class__ = book.Norm  # the norm was changed: the book computes it
    assert not taken(model)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_short_form_of_attention_is_compared_with_the_book(dtype, monkeypatch):
    def queries(qkv, turn, mask, H, K, eps):
        return qkv[..., : qkv.size(-1) * H // (H + 2 * K)]

    monkeypatch.setattr(fast.ShortAttention, "apply", queries)
    assert "attention" not in fast.agreeing(shape("modern"), CPU, dtype)


def test_the_long_form_is_compared_where_all_texts_are_short(monkeypatch):
    """It is that of layers with hooks, and of LoRA."""
    turn = fast.turn
    monkeypatch.setattr(fast, "turn", lambda x, *angles: turn(x.detach(), *angles))
    assert "attention" not in fast.agreeing(shape("modern"), CPU, torch.float32)


@pytest.mark.parametrize("cap", [0, 15, 500])
def test_a_loss_is_right_however_sure_and_wrong_the_model_is(cap):
    plain, quick = (make("modern", vocab_size=61, logit_cap=cap) for _ in range(2))
    fast.install(quick, ["head"])
    states, targets, found = torch.randn(1, 30, 32), torch.arange(30)[None], []
    for model in (plain, quick):
        with torch.no_grad():
            model.head.weight.copy_(torch.eye(61, 32) * 300)
        found.append(model.cross_entropy(300 * states, targets, "sum"))
    torch.testing.assert_close(*found)


def test_a_run_that_goes_on_gets_no_part_that_it_had_not():
    here = Machine(CPU, torch.float32, compile=False, rank=0, world=1, why="")
    every = list(fast.PARTS)
    # a run that was begun with --fast=false has none, and is now asked to have them
    for had, gets in ((["norm", "head"], ["norm", "head"]), ([], every), (every, every)):
        model = make("canon")
        fast.use(model, here, True, before=dict(fast=had))
        assert fast.installed(model) == gets
