import torch


def min_p(logits, uniform, p):
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    kept = probabilities.where(probabilities >= least, 0).cpu().double().cumsum(dim=-1)
    index = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:], right=True)
    return index[:, 0].to(logits.device)


@torch.no_grad()
def write(net, prompt, count):
    cache = net.new_cache()
    new, tokens = [], prompt
    for _ in range(count):
        logits = net(torch.tensor([tokens]), cache=cache)[:, -1]
        tokens = [logits.argmax().item()]
        new += tokens
    return new
