"""The training step in PyTorch, as one would write it after ALBEF; for ``train_step.py``.

The same networks, losses and updates as in the settings there: momentum forward pass, SIC against
batch and queue with soft targets, hard negatives by multinomial, SIM over 3 n pairs, AdamW, moving
average, queue. Written to be fast: one product for query, key and value, scaled dot-product
attention, fused AdamW, foreach averages, frozen parts once for both passes.
"""

import contextlib
import copy
import math

import librosa
import torch
import torch.nn.functional as F
from torch import nn

RATE, WINDOW = 16_000, 400


def valid_tokens(lengths, size):
    """(n,) -> (n, size) bool, True for real tokens."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def sinusoids(length, width):
    """(length, width) position embeddings."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention to the tokens themselves, or to a context."""

    def __init__(self, width, heads, has_context):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width if has_context else 3 * width)
        self.context = nn.Linear(width, 2 * width) if has_context else None
        self.output = nn.Linear(width, width)

    def forward(self, x, context, mask):
        n, length, width = x.shape
        if self.context is None:
            parts = self.query(x).view(n, length, 3, self.heads, -1)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
        else:
            query = self.query(x).view(n, length, self.heads, -1).transpose(1, 2)
            parts = self.context(context).view(n, context.shape[1], 2, self.heads, -1)
            key, value = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(y.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, mlp_ratio, has_context):
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, False)
        self.has_context = has_context
        if has_context:
            self.cross_norm = nn.LayerNorm(width, eps=1e-6)
            self.cross = Attention(width, heads, True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, hidden),
            nn.GELU("tanh"),
            nn.Linear(hidden, width),
        )

    def forward(self, x, context, mask):
        x = x + self.attention(self.norm(x), None, mask)
        if self.has_context:
            x = x + self.cross(self.cross_norm(x), context, None)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Blocks and a last norm."""

    def __init__(self, width, depth, heads, mlp_ratio, has_context=False):
        super().__init__()
        blocks = [Block(width, heads, mlp_ratio, has_context) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, lengths=None, context=None):
        mask = None
        if lengths is not None:
            mask = valid_tokens(lengths, x.shape[1])[:, None, None]
        for block in self.blocks:
            x = block(x, context, mask)
        return self.norm(x)


class WithCls(nn.Module):
    """A learned [CLS] before the tokens, then a transformer."""

    def __init__(self, width, depth, heads, mlp_ratio):
        super().__init__()
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.transformer = Transformer(width, depth, heads, mlp_ratio)

    def forward(self, x, lengths=None):
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return self.transformer(x, None if lengths is None else lengths + 1)


class LightSpeech(nn.Module):
    """Log-mel spectrogram, convolutions of stride 2, transformer."""

    def __init__(self, width, depth, heads, mlp_ratio, mels=80, hop=240, layers=3):
        super().__init__()
        self.hop = hop
        filters = librosa.filters.mel(sr=RATE, n_fft=WINDOW, n_mels=mels)
        self.register_buffer("filters", torch.from_numpy(filters))
        self.register_buffer("window", torch.hann_window(WINDOW, periodic=False))
        channels = [mels, *[width] * layers]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, 3, stride=2) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", sinusoids(512, width))
        self.head = WithCls(width, depth, heads, mlp_ratio)

    def prepare(self, waveform, lengths):
        """Return what has no parameters: normalized log-mel (n, M, T) and its lengths."""
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform, WINDOW, self.hop, window=self.window, center=False, return_complex=True
            )
            power = torch.view_as_real(spectrum).square().sum(-1)
            x = (self.filters @ power + 1e-6).log()
            lengths = ((lengths - WINDOW) // self.hop + 1).clamp(0, x.shape[2])
            valid = valid_tokens(lengths, x.shape[2])[:, None]
            count = lengths.clamp(min=1)[:, None, None]
            mean = (x * valid).sum(2, keepdim=True) / count
            spread = (((x - mean) * valid).square().sum(2, keepdim=True) / count).sqrt()
            return (x - mean) / (spread + 0.01) * valid, lengths

    def forward(self, x, lengths):
        for convolution in self.convolutions:
            x = F.gelu(convolution(F.pad(x, (0, 2))), approximate="tanh")
            lengths = (lengths + 1) // 2
            x = x * valid_tokens(lengths, x.shape[2])[:, None]
        x = self.norm(x.transpose(1, 2))
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        return self.head(x, lengths), lengths + 1


class LightImage(nn.Module):
    """Convolutions of stride 2 to the patches, transformer, means over squares of patches."""

    def __init__(self, width, depth, heads, mlp_ratio, side, patch=8, blocks=1, pool=2):
        super().__init__()
        self.grid, self.pool = side // patch, pool
        layers = int(math.log2(patch))
        channels = [3, *(width // 2 ** (layers - 1 - i) for i in range(layers))]
        self.stem = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1)
            for a, b in zip(channels, channels[1:], strict=False)
        )
        self.embedding = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid**2, width))
        self.head = WithCls(width, depth, heads, mlp_ratio)

    def forward(self, image):
        # (n, H, W, 3) seen as channels first is channels_last in memory, which suits convolutions.
        x = image.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        for convolution in self.stem:
            x = F.gelu(convolution(x), approximate="tanh")
        x = self.embedding(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = x + F.gelu(block(x), approximate="tanh")
        x = x.flatten(2).transpose(1, 2)
        x = self.head(x + self.positions)
        n, _, width = x.shape
        side, pool = self.grid // self.pool, self.pool
        pooled = x[:, 1:].reshape(n, side, pool, side, pool, width).mean(dim=(2, 4))
        return torch.cat([x[:, :1], pooled.flatten(1, 2)], dim=1)


class TokenHead(nn.Module):
    """Norm, linear map and transformer on the tokens of a published network."""

    def __init__(self, inputs, width, depth, heads, mlp_ratio, positions):
        super().__init__()
        self.norm, self.input = nn.LayerNorm(inputs, eps=1e-6), nn.Linear(inputs, width)
        self.register_buffer("positions", sinusoids(1024, width) if positions else None)
        self.head = WithCls(width, depth, heads, mlp_ratio)

    def forward(self, x, lengths=None):
        x = self.input(self.norm(x))
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]].to(x.dtype)
        return self.head(x, lengths)


class HubertSpeech(nn.Module):
    """HuBERT of transformers, its convolutions or all of it frozen, under a small transformer."""

    def __init__(self, tower, frozen, head):
        super().__init__()
        from transformers import HubertConfig, HubertModel

        rates = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
        rates += ("layerdrop", "mask_time_prob", "mask_feature_prob")
        config = HubertConfig(
            attn_implementation="sdpa",
            apply_spec_augment=False,
            **tower,
            **dict.fromkeys(rates, 0.0),
        )
        self.tower, self.frozen = HubertModel(config), frozen
        self.tower.feature_extractor._freeze_parameters()
        if frozen == "tower":
            self.tower.requires_grad_(False)
        for name, parameter in self.tower.named_parameters():
            if name == "masked_spec_embed":  # for masking, which is off; not in all versions
                parameter.requires_grad_(False)
        self.layer_weights = None
        if frozen == "tower":
            self.layer_weights = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.head = TokenHead(config.hidden_size, positions=True, **head)

    def prepare(self, waveform, lengths):
        """Return what the frozen part makes of the recordings, and its lengths."""
        samples = lengths
        config = self.tower.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
        if self.frozen == "tower":
            mask = valid_tokens(samples, waveform.shape[1])
            output = self.tower(waveform, attention_mask=mask, output_hidden_states=True)
            return output.hidden_states, lengths
        return self.tower.feature_extractor(waveform).transpose(1, 2), lengths

    def forward(self, x, lengths):
        if self.layer_weights is None:
            x = self.tower.feature_projection(x)
            mask = valid_tokens(lengths, x.shape[1])
            x = self.tower.encoder(x, attention_mask=mask)[0]
        else:
            weights = self.layer_weights.softmax(0)
            x = sum(weight * state for weight, state in zip(weights, x, strict=True))
        return self.head(x, lengths), lengths + 1


class ViTImage(nn.Module):
    """CLIP's ViT of transformers under a small transformer."""

    def __init__(self, tower, head):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        config = CLIPVisionConfig(attn_implementation="sdpa", **tower)
        model = CLIPVisionModel(config)
        self.tower = getattr(model, "vision_model", model)
        self.head = TokenHead(config.hidden_size, positions=False, **head)

    def forward(self, image):
        x = image.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        x = self.tower(x).last_hidden_state
        return self.head(self.tower.post_layernorm(x))


class Encoders(nn.Module):
    """What has a moving average: both encoders and their projections."""

    def __init__(self, speech, image, width, size):
        super().__init__()
        self.speech, self.image = speech, image
        self.speech_projection = nn.Linear(width, size)
        self.image_projection = nn.Linear(width, size)

    def forward(self, x, lengths, image):
        speech, lengths = self.speech(x, lengths)
        image = self.image(image)
        with torch.autocast(speech.device.type, enabled=False):
            z_speech = F.normalize(self.speech_projection(speech[:, 0].float()), dim=-1)
            z_image = F.normalize(self.image_projection(image[:, 0].float()), dim=-1)
        return speech, lengths, image, z_speech, z_image


class Matcher(nn.Module):
    """The multimodal encoder with its head."""

    def __init__(self, inputs, width, depth, heads, mlp_ratio):
        super().__init__()
        self.speech_input, self.image_input = nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.transformer = Transformer(width, depth, heads, mlp_ratio, has_context=True)
        self.head = nn.Linear(width, 2)

    def forward(self, speech, lengths, image):
        x = self.transformer(self.speech_input(speech), lengths, self.image_input(image))
        return self.head(x[:, 0]).float()


class TorchStep:
    """Model, state and step.

    Args:
      encoders: ``Encoders``.
      matcher: ``Matcher``.
      setting: dict with queue, momentum, alpha, tau, learning_rate, weight_decay, b2, clip_norm.
      device: "cpu" or "cuda".
      bfloat16: whether to run in autocast.
      mode: of torch.compile, such as "default"; None for eager.
    """

    def __init__(self, encoders, matcher, setting, device, bfloat16, mode):
        self.setting, self.device, self.bfloat16 = setting, device, bfloat16
        self.online, self.matcher = encoders.to(device), matcher.to(device)
        self.log_tau = nn.Parameter(torch.tensor(math.log(setting["tau"]), device=device))
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)
        pairs = zip(self.momentum.parameters(), self.online.parameters(), strict=True)
        pairs = [pair for pair in pairs if pair[1].requires_grad]
        self.average, self.averaged = [list(side) for side in zip(*pairs, strict=True)]
        # One copy of what is frozen.
        frozen = getattr(self.online.speech, "frozen", None)
        if frozen == "tower":
            self.momentum.speech.tower = self.online.speech.tower
        elif frozen == "conv":
            extractor = self.online.speech.tower.feature_extractor
            self.momentum.speech.tower.feature_extractor = extractor

        size = encoders.speech_projection.out_features
        rows = F.normalize(torch.randn(2, setting["queue"], size, device=device), dim=-1)
        self.queue = [rows[0].clone(), rows[1].clone()]
        self.queue_ids = torch.arange(setting["queue"], device=device) + 1_000_000
        self.cursor = 0

        modules = (self.online, self.matcher)
        trained = [p for m in modules for p in m.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1]
        others = [p for p in trained if p.ndim <= 1] + [self.log_tau]
        self.trained = [*matrices, *others]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": setting["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=setting["learning_rate"],
            betas=(0.9, setting["b2"]),
            fused=True,
        )
        self.loss = self._loss
        if mode is not None:
            self.loss = torch.compile(self._loss, dynamic=False, mode=mode)

    def parameter_count(self):
        """Return the number of trained parameters."""
        return sum(p.numel() for p in self.trained)

    def place(self, batch):
        """Put a batch of numpy arrays on the device; tokens of a cache stand for the image."""
        placed = {name: torch.from_numpy(rows).to(self.device) for name, rows in batch.items()}
        if "image_tokens" in placed:
            placed["image"] = placed.pop("image_tokens").float()
        return placed

    def _loss(self, waveform, lengths, image, ids, queue_speech, queue_image, queue_ids):
        setting, n = self.setting, len(ids)
        with torch.no_grad():
            prepared = self.online.speech.prepare(waveform, lengths)
            _, _, _, key_speech, key_image = self.momentum(*prepared, image)
        speech, speech_lengths, images, z_speech, z_image = self.online(*prepared, image)

        # SIC with soft targets.
        with torch.autocast(self.device, enabled=False):
            tau = self.log_tau.exp()
            bank_speech = torch.cat([key_speech, queue_speech])
            bank_image = torch.cat([key_image, queue_image])
            logits = [z_speech @ bank_image.T / tau, z_image @ bank_speech.T / tau]
            with torch.no_grad():
                same = (ids[:, None] == torch.cat([ids, queue_ids])).float()
                same = same / same.sum(1, keepdim=True)
                keys = [key_speech @ bank_image.T / tau, key_image @ bank_speech.T / tau]
                alpha = setting["alpha"]
                targets = [alpha * key.softmax(1) + (1 - alpha) * same for key in keys]
            sic = sum(F.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)) / 2

            # Hard negatives.
            with torch.no_grad():
                other = ids[:, None] != ids
                weights = [(x[:, :n].softmax(1) + 1e-9) * other for x in logits]
                mined_image, mined_speech = (torch.multinomial(w, 1)[:, 0] for w in weights)

        # SIM.
        logits = self.matcher(
            torch.cat([speech, speech, speech[mined_speech]]),
            torch.cat([speech_lengths, speech_lengths, speech_lengths[mined_speech]]),
            torch.cat([images, images[mined_image], images]),
        )
        labels = torch.zeros(3 * n, dtype=torch.long, device=ids.device)
        labels[:n] = 1
        sim = F.cross_entropy(logits, labels)
        return sic + sim, sic.detach(), sim.detach(), key_speech, key_image

    def step(self, batch):
        """Take one step; return the losses as tensors."""
        torch.compiler.cudagraph_mark_step_begin()  # for mode="reduce-overhead"
        autocast = contextlib.nullcontext()
        if self.bfloat16:
            autocast = torch.autocast(self.device, torch.bfloat16)
        with autocast:
            loss, sic, sim, key_speech, key_image = self.loss(
                *(batch[name] for name in ("waveform", "speech_lengths", "image", "image_id")),
                *self.queue,
                self.queue_ids,
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            nn.utils.clip_grad_norm_(self.trained, self.setting["clip_norm"], foreach=True)
            self.optimizer.step()
            self.log_tau.clamp_(math.log(0.001), math.log(0.5))
            torch._foreach_lerp_(self.average, self.averaged, 1 - self.setting["momentum"])
            n, size = len(batch["image_id"]), len(self.queue_ids)
            slots = (self.cursor + torch.arange(n, device=self.device)) % size
            for queue, rows in zip(self.queue, (key_speech, key_image), strict=True):
                queue[slots] = rows
            self.queue_ids[slots] = batch["image_id"].to(self.queue_ids.dtype)
            self.cursor = (self.cursor + n) % size
        return sic.clone(), sim.clone()  # the next step of CUDA graphs writes over them
