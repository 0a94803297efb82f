"""Files as people have them, in their names and their layout; the weights are zeros, and few.

Each is a function that writes one into a folder and gives back its path. What they hold is as the
library that is named writes it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class _Values:
    """What tensors are filled with: zeros, but for every n-th one of an edited copy."""

    every, made = 0, 0


def blank(*shape: int, dtype: Any = None) -> Tensor:
    _Values.made += 1
    changed = _Values.every and _Values.made % _Values.every == 0
    return torch.full(shape, 0.5 if changed else 0.0, dtype=dtype or torch.float32)


def written(name: str, folder: Path, every: int = 0) -> Path:
    """One of the files; with ``every`` each n-th tensor has other values."""
    folder.mkdir()
    _Values.every, _Values.made = every, 0
    return FILES[name](folder)


def zeros(model: nn.Module) -> State:
    """A state_dict of a model on meta: zeros, with an eighth of each large dimension."""
    return OrderedDict(
        (name, blank(*(d // 8 if d >= 64 else d for d in t.shape), dtype=t.dtype))
        for name, t in model.state_dict().items()
    )


def layer(state: State, name: str, *shape: int, bias: bool = True, dtype: Any = None) -> None:
    state[f"{name}.weight"] = blank(*shape, dtype=dtype)
    if bias:
        state[f"{name}.bias"] = blank(shape[0], dtype=dtype)


def resnet(folder: Path) -> Path:
    """torchvision's references, under DataParallel."""
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.resnet18()
    state = zeros(model)
    shapes = [tuple(state[name].shape) for name, _ in model.named_parameters()]
    params = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    optimizer = torch.optim.SGD(params, 0.1, 0.9, weight_decay=1e-4)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    path = folder / "checkpoint.pth.tar"
    torch.save(
        {
            "epoch": 31,
            "arch": "resnet18",
            "state_dict": {f"module.{name}": t for name, t in state.items()},
            "best_acc1": torch.tensor(69.758),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        path,
    )
    return path


def bert(folder: Path) -> Path:
    """transformers' BertForMaskedLM, in two shards."""
    state: State = {}
    at = "bert.embeddings"
    for name, n in (("word", 305), ("position", 51), ("token_type", 2)):
        layer(state, f"{at}.{name}_embeddings", n, 76, bias=False)
    layer(state, f"{at}.LayerNorm", 76)
    for i in range(12):
        at = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            layer(state, f"{at}.attention.self.{part}", 76, 76)
        layer(state, f"{at}.attention.output.dense", 76, 76)
        layer(state, f"{at}.attention.output.LayerNorm", 76)
        layer(state, f"{at}.intermediate.dense", 307, 76)
        layer(state, f"{at}.output.dense", 76, 307)
        layer(state, f"{at}.output.LayerNorm", 76)
    state["cls.predictions.bias"] = blank(305)
    layer(state, "cls.predictions.transform.dense", 76, 76)
    layer(state, "cls.predictions.transform.LayerNorm", 76)
    return shards(folder / "bert-base-uncased", state, 2)


def shards(folder: Path, state: State, n: int) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    names, where = list(state), {}
    for i in range(n):
        part = names[i * len(names) // n : (i + 1) * len(names) // n]
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    size = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gpt2(folder: Path) -> Path:
    from safetensors.torch import save_file

    state: State = {}
    for i in range(12):
        layer(state, f"h.{i}.ln_1", 76)
        state[f"h.{i}.attn.bias"] = blank(1, 1, 102, 102)
        layer(state, f"h.{i}.attn.c_attn", 76, 230)
        layer(state, f"h.{i}.attn.c_proj", 76, 76)
        layer(state, f"h.{i}.ln_2", 76)
        layer(state, f"h.{i}.mlp.c_fc", 76, 307)
        layer(state, f"h.{i}.mlp.c_proj", 307, 76)
    layer(state, "ln_f", 76)
    layer(state, "wpe", 102, 76, bias=False)
    layer(state, "wte", 5025, 76, bias=False)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def llama(folder: Path) -> Path:
    state: State = {}

    def add(name: str, *shape: int) -> None:
        layer(state, name, *shape, bias=False, dtype=torch.bfloat16)

    at = "model.language_model.model"
    add(f"{at}.embed_tokens", 3200, 40)
    for i in range(32):
        for part, rows in (("q", 40), ("k", 10), ("v", 10), ("o", 40)):
            add(f"{at}.layers.{i}.self_attn.{part}_proj", rows, 40)
        add(f"{at}.layers.{i}.mlp.gate_proj", 143, 40)
        add(f"{at}.layers.{i}.mlp.up_proj", 143, 40)
        add(f"{at}.layers.{i}.mlp.down_proj", 40, 143)
        add(f"{at}.layers.{i}.input_layernorm", 40)
        add(f"{at}.layers.{i}.post_attention_layernorm", 40)
    add(f"{at}.norm", 40)
    add("model.language_model.lm_head", 3200, 40)
    return shards(folder / "llama", state, 3)


# ---------------------------------------------------------------------- a module of an own class


class Conv(nn.Module):
    def __init__(self, a: int, b: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(a, b, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(b)
        self.act = nn.SiLU()


class Bottleneck(nn.Module):
    def __init__(self, a: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(a, a), Conv(a, a, 3), True


class C3(nn.Module):
    def __init__(self, a: int, n: int) -> None:
        super().__init__()
        half = a // 2
        self.cv1, self.cv2, self.cv3 = Conv(a, half), Conv(a, half), Conv(a, a)
        self.m = nn.Sequential(*(Bottleneck(half) for _ in range(n)))


class Detect(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.nc, self.no, self.nl = 80, 85, len(widths)
        self.register_buffer("anchors", blank(3, 3, 2))
        self.m = nn.ModuleList(nn.Conv2d(w, 255, 1) for w in widths)


class DetectionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yaml = {"nc": 80, "depth_multiple": 0.33, "width_multiple": 0.5}
        self.model = nn.Sequential(
            *(Conv(3, 8, 6, 2), Conv(8, 16, 3, 2), C3(16, 1), Conv(16, 32, 3, 2), C3(32, 2)),
            *(Conv(32, 64, 3, 2), C3(64, 3), nn.Upsample(None, 2), Detect((16, 32, 64))),
        )
        self.names = {0: "person", 1: "bicycle", 2: "car"}
        self.stride = torch.tensor([8.0, 16.0, 32.0])


def yolo(folder: Path) -> Path:
    """YOLOv5's: whole modules in a dict."""
    path = folder / "best.pt"
    model = DetectionModel().half()
    for param in model.parameters():
        param.requires_grad = False
        param.data = blank(*param.shape, dtype=torch.half)
    torch.save(
        {
            "epoch": 41,
            "best_fitness": 0.37461,
            "model": model,
            **dict.fromkeys(("ema", "updates", "optimizer")),
            "opt": {"weights": "yolov5s.pt", "epochs": 100, "batch_size": 16, "imgsz": 640},
            "git": {"remote": None, "branch": None, "commit": None},
            "date": "2024-03-01T12:00:00.000000",
        },
        path,
    )
    return path


# ---------------------------------------------------------------------- training


def kept(optimizer: torch.optim.Adam | torch.optim.AdamW) -> dict[str, Any]:
    """Its state_dict, with what tells both apart, which torch before 2.7 did not keep."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.setdefault("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW)
    return state


def lightning(folder: Path) -> Path:
    net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-4)
    for param in net.parameters():
        param.data = blank(*param.shape)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    state = {f"model.{name}": t for name, t in net.state_dict().items()}
    path = folder / "epoch=12-step=48750.ckpt"
    torch.save(
        {
            "epoch": 12,
            "global_step": 48750,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {**state, **{f"ema_{name}": t.clone() for name, t in state.items()}},
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 13}}}},
            "callbacks": {
                "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": {
                    "monitor": "val_loss",
                    "best_model_score": torch.tensor(0.2817),
                    "best_model_path": "/runs/lightning_logs/version_3/checkpoints/last.ckpt",
                },
                "EMA": {"decay": 0.9999},
            },
            "optimizer_states": [kept(optimizer)],
            "lr_schedulers": [{"base_lrs": [3e-4], "last_epoch": 12, "_last_lr": [2.1e-4]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 3e-4, "width": 64, "dropout": 0.1},
        },
        path,
    )
    return path


def gan(folder: Path) -> Path:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    made: dict[str, Any] = {"iteration": 120000}
    nets = {
        "netG": nn.Sequential(*block(100, 64), *block(64, 32), nn.ConvTranspose2d(32, 3, 4)),
        "netD": nn.Sequential(nn.Conv2d(3, 32, 4), nn.LeakyReLU(0.2), nn.Conv2d(32, 1, 4)),
    }
    for name, net in nets.items():
        optimizer = torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999))
        for param in net.parameters():
            param.data = blank(*param.shape)
            param.grad = torch.zeros_like(param)
        optimizer.step()
        made[f"{name}_state_dict"] = net.state_dict()
        made[f"optimizer{name[-1]}_state_dict"] = kept(optimizer)
    torch.save(made, folder / "gan_120000.pth")
    return folder / "gan_120000.pth"


def lora(folder: Path) -> Path:
    """peft's adapter for a causal model."""
    from safetensors.torch import save_file

    state: State = {}
    for i in range(16):
        for part in ("q_proj", "v_proj"):
            at = f"base_model.model.model.layers.{i}.self_attn.{part}"
            state[f"{at}.lora_A.weight"] = blank(8, 204)
            state[f"{at}.lora_B.weight"] = blank(204 if part[0] == "q" else 51, 8)
    path = folder / "adapter_model.safetensors"
    save_file(state, path, {"format": "pt"})
    return path


def unet(folder: Path) -> Path:
    """diffusers' UNet2DConditionModel."""
    from safetensors.torch import save_file

    state: State = {}

    def resnet_block(at: str, a: int, b: int) -> None:
        layer(state, f"{at}.norm1", a)
        layer(state, f"{at}.conv1", b, a, 3, 3)
        layer(state, f"{at}.time_emb_proj", b, 64)
        layer(state, f"{at}.norm2", b)
        layer(state, f"{at}.conv2", b, b, 3, 3)
        if a != b:
            layer(state, f"{at}.conv_shortcut", b, a, 1, 1)

    def attention(at: str, a: int) -> None:
        layer(state, f"{at}.norm", a)
        layer(state, f"{at}.proj_in", a, a)
        inner = f"{at}.transformer_blocks.0"
        for n, context in (("1", a), ("2", 77)):
            layer(state, f"{inner}.norm{n}", a)
            layer(state, f"{inner}.attn{n}.to_q", a, a, bias=False)
            layer(state, f"{inner}.attn{n}.to_k", a, context, bias=False)
            layer(state, f"{inner}.attn{n}.to_v", a, context, bias=False)
            layer(state, f"{inner}.attn{n}.to_out.0", a, a)
        layer(state, f"{inner}.norm3", a)
        layer(state, f"{inner}.ff.net.0.proj", 8 * a, a)
        layer(state, f"{inner}.ff.net.2", a, 4 * a)
        layer(state, f"{at}.proj_out", a, a)

    layer(state, "conv_in", 16, 4, 3, 3)
    layer(state, "time_embedding.linear_1", 64, 16)
    layer(state, "time_embedding.linear_2", 64, 64)
    widths = (16, 32, 64)
    for i, width in enumerate(widths):
        for j in range(2):
            before = widths[max(i - 1, 0)] if j == 0 else width
            resnet_block(f"down_blocks.{i}.resnets.{j}", before, width)
            attention(f"down_blocks.{i}.attentions.{j}", width)
        if i < 2:
            layer(state, f"down_blocks.{i}.downsamplers.0.conv", width, width, 3, 3)
    for j in range(2):
        resnet_block(f"mid_block.resnets.{j}", 64, 64)
    attention("mid_block.attentions.0", 64)
    for i, width in enumerate(widths[::-1]):
        for j in range(3):
            resnet_block(f"up_blocks.{i}.resnets.{j}", width * 2, width)
            attention(f"up_blocks.{i}.attentions.{j}", width)
    layer(state, "conv_norm_out", 16)
    layer(state, "conv_out", 4, 16, 3, 3)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(state, path, {"format": "pt"})
    return path


def swin(folder: Path) -> Path:
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.swin_t()
    torch.save(zeros(model), folder / "swin_t-704ceda3.pth")
    return folder / "swin_t-704ceda3.pth"


FILES: dict[str, Callable[[Path], Path]] = {
    "resnet18": resnet,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "yolo": yolo,
    "lightning": lightning,
    "gan": gan,
    "lora": lora,
    "unet": unet,
    "swin": swin,
}
