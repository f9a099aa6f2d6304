"""Modules as many write them by hand, which the ops can compute."""

from torch import nn


class Attention(nn.Module):
    """BERT's attention as many write it by hand."""

    def __init__(self, width=64, heads=2):
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)

    def heads(self, x):
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def scores(self, query, key):
        return query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5

    def maps(self, scores):
        return self.dropout(scores.softmax(-1))

    def masked(self, scores, mask):
        return scores if mask is None else scores + mask

    def forward(self, hidden_states, attention_mask=None, position_ids=None):
        query, key, value = (self.heads(layer(hidden_states)) for layer in (self.query, self.key, self.value))
        maps = self.maps(self.masked(self.scores(query, key), attention_mask))
        return ((maps @ value).transpose(1, 2).flatten(-2),)


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(64, 64), nn.LayerNorm(64), nn.Dropout(0.1)

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)
        self.p = 0.5

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))
