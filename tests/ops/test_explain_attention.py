"""``explain`` names the path that a call of an attention op takes: explained, then observed."""

import itertools

import pytest
import torch

from observed_path import believe_in_a_gpu, observe
from op_testing import DEVICE, KERNELS_RUN, run_in_interpreter
from sclkern import ops


def heads(queries=5, keys=7, head_dim=32, dtype=torch.float32, batch=2, **options):
    """A call of ``attention``."""
    lengths = {"query": queries, "key": keys, "value": keys}
    tensors = {name: torch.randn(batch, n, 2, head_dim).to(DEVICE, dtype) for name, n in lengths.items()}
    return "attention", tensors | options


def packed(lengths=((3, 4), (3, 4), (5, 2)), head_dim=32, dtype=torch.float32, **options):
    """A call of ``packed_attention``; a pair of lengths for each sequence."""
    sides = [[pair[side] for pair in lengths] for side in (0, 1)]
    ends = [torch.tensor([0, *itertools.accumulate(s)], dtype=torch.int32, device=DEVICE) for s in sides]
    query, key, value = (torch.randn(sum(s), 2, head_dim).to(DEVICE, dtype) for s in (*sides, sides[1]))
    longest = [max(s, default=0) for s in sides]
    arguments = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    arguments |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    return "packed_attention", {"query": query, "key": key, "value": value} | arguments | options


def frames(num_frames=3, head_dim=32, dtype=torch.float32, batch=1, **options):
    """A call of ``frame_attention``."""
    tensors = [torch.randn(batch, num_frames * 4, 2, head_dim).to(DEVICE, dtype) for _ in range(3)]
    return "frame_attention", dict(zip(("query", "key", "value"), tensors, strict=True)) | {
        "num_frames": num_frames
    } | options  # fmt: skip


def cross(queries, keys, width=64, num_heads=2, dtype=torch.float32, batch=1, **options):
    """A call of ``cross_attention``."""
    shapes = {
        "x": (batch, queries, width),
        "context": (batch, keys, width),
        "in_weight": (3 * width, width),
        "in_bias": (3 * width,),
        "out_weight": (width, width),
        "out_bias": (width,),
    }
    tensors = {name: torch.randn(shape).to(DEVICE, dtype) for name, shape in shapes.items()}
    return "cross_attention", tensors | {"num_heads": num_heads} | options


SEED = torch.tensor([3], device=DEVICE)
MASK = torch.arange(7, device=DEVICE) < torch.tensor([[7], [4]], device=DEVICE)
# A call, the path on a CPU, and the path where kernels run.
CALLS = {
    "attention": (heads(), "sdpa", "triton"),
    "head dim 64": (heads(head_dim=64), "sdpa", "triton"),
    "head dim 20": (heads(head_dim=20), "sdpa", "sdpa"),
    "head dim 48": (heads(head_dim=48), "sdpa", "sdpa"),
    "scale 0.3": (heads(softmax_scale=0.3), "sdpa", "triton"),
    "scale 0": (heads(softmax_scale=0), "sdpa", "sdpa"),
    "scale -1": (heads(softmax_scale=-1), "sdpa", "sdpa"),
    "dropout": (heads(dropout_p=0.3), "cpu", "triton"),
    "dropout with a seed": (heads(dropout_p=0.3, seed=3), "cpu", "triton"),
    "dropout with a seed tensor": (heads(dropout_p=0.3, seed=SEED), "cpu", "triton"),
    "dropout with a seed, head dim 20": (heads(dropout_p=0.3, seed=3, head_dim=20), "cpu", "cpu"),
    "dropout and a mask": (heads(dropout_p=0.3, key_padding_mask=MASK), "sdpa", "triton"),
    "dropout with a seed and a mask": (heads(dropout_p=0.3, seed=3, key_padding_mask=MASK), "eager", "triton"),
    "dropout of everything": (heads(dropout_p=1.0), "eager", "triton"),
    "a seed without dropout": (heads(seed=3), "sdpa", "triton"),
    "mask": (heads(key_padding_mask=MASK), "sdpa", "triton"),
    "log-sum-exp": (heads(return_lse=True), "sdpa", "triton"),
    "float64": (heads(dtype=torch.float64), "sdpa", "sdpa"),
    "float16": (heads(dtype=torch.float16), "sdpa", "triton"),
    "bfloat16": (heads(dtype=torch.bfloat16), "sdpa", "triton"),
    "no keys": (heads(keys=0), "eager", "triton"),
    "no queries": (heads(queries=0), "eager", "triton"),
    "no samples": (heads(batch=0), "eager", "triton"),
    "eager by name": (heads(backend="eager"), "eager", "eager"),
    "packed": (packed(), "grouped", "triton"),
    "packed, equal lengths": (packed([(3, 4)] * 3), "grouped", "triton"),
    "packed, dropout": (packed(dropout_p=0.3), "grouped", "triton"),
    "packed, dropout with a seed": (packed(dropout_p=0.3, seed=3), "grouped", "triton"),
    "packed, head dim 20": (packed(head_dim=20), "grouped", "grouped"),
    "packed, scale -1": (packed(softmax_scale=-1.0), "grouped", "grouped"),
    "packed, float64": (packed(dtype=torch.float64), "grouped", "grouped"),
    "packed, an empty sequence": (packed([(3, 0), (2, 5)]), "grouped", "triton"),
    "packed, no sequences": (packed([]), "eager", "triton"),
    "packed, eager by name": (packed(backend="eager"), "eager", "eager"),
    "frames": (frames(), "sdpa", "triton"),
    "frames, head dim 48": (frames(head_dim=48), "sdpa", "sdpa"),
    "frames, scale 0": (frames(softmax_scale=0.0), "sdpa", "sdpa"),
    "frames, float64": (frames(dtype=torch.float64), "sdpa", "sdpa"),
    "one frame": (frames(1), "sdpa", "triton"),
    "frames, no samples": (frames(batch=0), "eager", "triton"),
    "frames, eager by name": (frames(backend="eager"), "eager", "eager"),
    "cross, few keys": (cross(65, 5), "absorbed-keys", "triton-absorbed-keys"),
    "cross, few queries": (cross(5, 65), "absorbed-queries", "triton-absorbed-queries"),
    "cross, few queries, dropout": (cross(5, 65, dropout_p=0.3, seed=3), "absorbed-queries", "triton-absorbed-queries"),
    "cross, few keys, dropout": (cross(65, 5, dropout_p=0.3, seed=3), "absorbed-keys", "triton-absorbed-keys"),
    "cross, equal lengths": (cross(13, 13), "sdpa", "triton"),
    # The shares of multiply-adds are 0.67, 0.69, 0.79 and 0.81; on a kernel, which pads 17 keys to 32, 1.0 from there.
    "cross, 16 keys": (cross(64, 16), "absorbed-keys", "triton-absorbed-keys"),
    "cross, 17 keys": (cross(64, 17), "absorbed-keys", "triton"),
    "cross, 21 keys": (cross(64, 21), "absorbed-keys", "triton"),
    "cross, 22 keys": (cross(64, 22), "sdpa", "triton"),
    "cross, 32 keys": (cross(325, 32), "absorbed-keys", "triton-absorbed-keys"),
    "cross, 33 keys": (cross(325, 33), "absorbed-keys", "absorbed-keys"),
    "cross, 33 keys, dropout": (cross(325, 33, dropout_p=0.3), "absorbed-keys", "triton"),
    "cross, too many heads": (cross(325, 17, 416, 13, absorb="keys"), "absorbed-keys", "absorbed-keys"),
    "cross, never": (cross(65, 5, absorb="never"), "sdpa", "triton"),
    "cross, never, dropout with a seed": (cross(65, 5, absorb="never", dropout_p=0.3, seed=3), "cpu", "triton"),
    "cross, never, head dim 16": (cross(65, 5, num_heads=4, absorb="never"), "sdpa", "sdpa"),
    "cross, never, no keys": (cross(65, 0, absorb="never"), "eager", "triton"),
    "cross, queries by name": (cross(13, 13, absorb="queries"), "absorbed-queries", "triton-absorbed-queries"),
    "cross, float64": (cross(65, 5, dtype=torch.float64), "absorbed-keys", "absorbed-keys"),
    "cross, scale -1": (cross(65, 5, softmax_scale=-1.0), "absorbed-keys", "triton-absorbed-keys"),
    "cross, scale -1, equal lengths": (cross(13, 13, softmax_scale=-1.0), "sdpa", "sdpa"),
    "cross, eager by name": (cross(65, 5, backend="eager"), "absorbed-keys", "absorbed-keys"),
    "cross, eager by name, equal lengths": (cross(13, 13, backend="eager"), "eager", "eager"),
}


def path_taken(op, events):
    """The name of the path that runs these kernels and functions."""
    core = {event for event in events if not event.endswith(("log_sum_exp", "_mask", "_threshold", "_probabilities"))}
    if core == {"kernel cross_attention"}:
        return "triton-absorbed-keys"
    if core == {"kernel cross_attention_softmax"}:
        return "triton-absorbed-queries"
    if core in ({"kernel attention"}, {"kernel frame_attention"}):
        return "triton"
    if op == "packed_attention":
        return "eager" if "reference packed_attention" in core else "grouped"
    if core == {"sdpa"}:
        return "sdpa"
    (event,) = core
    if event == "cpu attention":
        return "cpu"
    absorbed = event.startswith(("reference cross_attention ", "cpu cross_attention "))
    return f"absorbed-{event.split()[2]}" if absorbed else "eager"


@pytest.mark.parametrize("kernels", [True] if KERNELS_RUN else [False, True], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_path_is_the_one_explained(name, kernels, monkeypatch):
    (op, arguments), *paths = CALLS[name]
    if kernels and not KERNELS_RUN:
        believe_in_a_gpu(monkeypatch)
    choice = ops.explain(op, **arguments)
    events = observe(monkeypatch, lambda: getattr(ops, op)(**arguments))
    assert choice.path == path_taken(op, events) == paths[kernels], (choice, events)
    assert choice.reasons and all(choice.reasons) and str(choice).startswith(f"{choice.backend}: ")


@pytest.mark.skipif(KERNELS_RUN, reason="a kernel runs here")
@pytest.mark.parametrize(("op", "calls"), [(packed([(3, 4), (3, 4), (5, 2)]), 2), (frames(), 2), (heads(), 1)])
def test_sdpa_is_called_once_for_each_group_of_equal_lengths_and_twice_for_frames(op, calls, monkeypatch):
    name, arguments = op
    assert observe(monkeypatch, lambda: getattr(ops, name)(**arguments)).count("sdpa") == calls


@pytest.mark.skipif(KERNELS_RUN, reason="a kernel runs here")
def test_every_reason_is_given():
    call = {"head_dim": 20, "dtype": torch.float64, "softmax_scale": -1.0, "dropout_p": 0.1, "seed": 3, "keys": 0}
    _, arguments = heads(**call, key_padding_mask=MASK[:, :0])
    text = str(ops.explain("attention", **arguments))
    for reason in (
        "head dim 20 has no kernel",
        "softmax_scale -1.0 is not above 0",
        "float64 has no kernel",
        "tensors on cpu, kernels need a GPU",
        "PyTorch's attention cannot draw the dropout mask of a seed",
        "no queries or no keys",
    ):
        assert reason in text, (reason, text)


def test_autocast_decides_by_the_dtype_it_casts_to():
    op, arguments = heads()
    arguments["key"] = arguments["key"].to(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert ops.explain(op, **arguments).path == ("triton" if KERNELS_RUN else "sdpa")
        assert ops.attention(**arguments).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"key: got torch\.bfloat16, expected that of query"):
        ops.explain(op, **arguments)


@pytest.mark.skipif(KERNELS_RUN, reason="a kernel runs here")
def test_a_compiled_graph_cannot_group_lengths(monkeypatch):
    _, arguments = packed()
    nodes = []

    def backend(graph, _):
        nodes.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(ops.packed_attention, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(**arguments), ops.packed_attention(**arguments))
    assert nodes and torch.nn.functional.scaled_dot_product_attention not in nodes
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    choice = ops.explain("packed_attention", **arguments)
    assert choice.path == "eager" and "a compiled graph does not know the lengths" in choice.reasons[-1]


def test_in_the_interpreter():
    run_in_interpreter(__file__)
