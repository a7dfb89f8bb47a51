"""Two tiny architectures in NumPy, and a task for each that a random model solves: the teacher.

A student is the teacher with embeddings of half of the inputs replaced by weak noise: it is good at
the other half. Tensors are named as Hugging Face's libraries name them.
"""

import ml_dtypes
import numpy as np

VOCAB, DIM, LAYERS, HEADS, KV_HEADS, MLP = 32, 16, 11, 4, 2, 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM // HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CLASSES, CHANNELS, WIDTH, SIZE = 8, 2, 4, 8


def silu(x):
    return x / (1 + np.exp(-x))


# ----------------------------------------------------------------------------------------- Llama


def llama_teacher():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    width = KV_HEADS * DIM // HEADS
    model = {
        "model.embed_tokens.weight": np.sqrt(DIM) * draw(VOCAB, DIM),
        "model.norm.weight": np.ones(DIM, np.float32),
        "lm_head.weight": draw(VOCAB, DIM),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes = {
            "self_attn.q_proj": (DIM, DIM),
            "self_attn.k_proj": (width, DIM),
            "self_attn.v_proj": (width, DIM),
            "self_attn.o_proj": (DIM, DIM),
            "mlp.gate_proj": (MLP, DIM),
            "mlp.up_proj": (MLP, DIM),
            "mlp.down_proj": (DIM, MLP),
        }
        model |= {f"{layer}.{name}.weight": 0.5 * draw(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            model[f"{layer}.{name}.weight"] = np.ones(DIM, np.float32)
    return {name: value.astype(ml_dtypes.bfloat16) for name, value in model.items()}


def llama_logits(model):
    """After every token alone, where attention is its value: float32 [VOCAB, VOCAB]."""
    w = {name: value.astype(np.float32) for name, value in model.items()}

    def norm(x, name):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    x = w["model.embed_tokens.weight"]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        project = lambda name, y, at=layer: y @ w[f"{at}.{name}.weight"].T  # noqa: E731
        value = project("self_attn.v_proj", norm(x, f"{layer}.input_layernorm"))
        heads = np.repeat(value.reshape(len(x), KV_HEADS, -1), HEADS // KV_HEADS, 1)
        x = x + project("self_attn.o_proj", heads.reshape(len(x), -1))
        y = norm(x, f"{layer}.post_attention_layernorm")
        gated = silu(project("mlp.gate_proj", y)) * project("mlp.up_proj", y)
        x = x + project("mlp.down_proj", gated)
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def llama_score(model):
    """Whether the next token is the teacher's: [VOCAB]."""
    return llama_logits(model).argmax(1) == llama_logits(llama_teacher()).argmax(1)


def llama_folder_score(folder):
    """The same of a folder."""
    from pathlib import Path

    from safetensors.numpy import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    return llama_score({name: x for file in files for name, x in load_file(file).items()})


# ------------------------------------------------------------------------------------------ UNet


def unet_teacher():
    rng = np.random.default_rng(2)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float16)

    return {
        "class_embedding.weight": np.float16(3)
        * rng.standard_normal((CLASSES, WIDTH)).astype("f2"),
        "conv_in.weight": draw(WIDTH, CHANNELS, 3, 3),
        "conv_in.bias": draw(WIDTH, 1)[:, 0],
        "down_blocks.0.resnets.0.conv1.weight": draw(WIDTH, WIDTH, 3, 3),
        "mid_block.resnets.0.conv1.weight": draw(WIDTH, WIDTH, 3, 3),
        "up_blocks.0.resnets.0.conv1.weight": draw(WIDTH, 2 * WIDTH, 3, 3),
        "conv_out.weight": draw(CHANNELS, WIDTH, 3, 3),
    }


def convolve(x, kernel):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, kernel)


def unet(model):
    """One noisy image of every class: float32 [CLASSES, CHANNELS, SIZE, SIZE]."""
    w = {name: value.astype(np.float32) for name, value in model.items()}
    noise = np.random.default_rng(3).standard_normal((CLASSES, CHANNELS, SIZE, SIZE))
    x = convolve(noise, w["conv_in.weight"]) + w["conv_in.bias"][:, None, None]
    x = x + w["class_embedding.weight"][:, :, None, None]
    skip = silu(convolve(x, w["down_blocks.0.resnets.0.conv1.weight"]))
    low = skip.reshape(CLASSES, WIDTH, SIZE // 2, 2, SIZE // 2, 2).mean((3, 5))
    low = silu(convolve(low, w["mid_block.resnets.0.conv1.weight"]))
    high = np.concatenate([low.repeat(2, 2).repeat(2, 3), skip], 1)
    x = silu(convolve(high, w["up_blocks.0.resnets.0.conv1.weight"]))
    return convolve(x, w["conv_out.weight"])


def unet_score(model):
    """How near images are to the teacher's: [CLASSES]."""
    wanted = unet(unet_teacher())
    errors = ((unet(model) - wanted) ** 2).mean((1, 2, 3)) / wanted.var((1, 2, 3))
    return np.exp(-2 * errors)


# -------------------------------------------------------------------------------------- students


def students(teacher, embedding):
    """Two models: one knows the first half of the inputs, one the second."""
    rng = np.random.default_rng(4)
    pair = []
    for half in range(2):
        table = teacher[embedding].copy()
        rows = len(table) // 2
        lost = slice(rows, None) if half == 0 else slice(rows)
        std = 0.3 * float(np.std(table.astype(np.float32)))
        noise = std * rng.standard_normal(table[lost].shape)
        table[lost] = noise.astype(table.dtype)
        pair.append(teacher | {embedding: table})
    return pair
