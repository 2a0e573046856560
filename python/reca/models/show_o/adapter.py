"""Show-o as an Adapter: one Phi transformer understands and generates; CLIP and the image tokenizer are frozen."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM

from reca.data.views import View, Views
from reca.draws import Draws, Purpose
from reca.models.base import Adapter, Batch, LossTerm
from reca.models.show_o import convert, prompt, sampling
from reca.models.show_o.config import ShowOConfig
from reca.models.show_o.modules import Magvit, PatchCodebook
from reca.models.tiny_tokenizer import word_tokenizer
from reca.models.weights import fetch, no_memory, put
from reca_kernels import masked_linear_cross_entropy, template_concat

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ShowO(Adapter):
    name = "show_o"
    kinds = frozenset({"reca", "i2t", "t2i"})
    abilities = frozenset({"generate", "answer"})
    trainable_roles = frozenset({"shared_lm", "embed", "bridge"})
    condition_keys = ("h_v",)

    def __init__(self, config: ShowOConfig, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vq = Magvit(config.magvit) if config.codec == "magvitv2" else PatchCodebook(config.patches)
        self.vocabulary = prompt.Vocabulary.of(tokenizer, self.vq.entries)
        self.showo = PhiForCausalLM(_phi(config, self.vocabulary.size))
        if self.uses_clip:
            self.clip = CLIPVisionModel(_clip(config))
            width = config.phi.hidden_size
            self.mm_projector = nn.Sequential(
                nn.Linear(config.clip_tower.hidden_size, width), nn.GELU(), nn.Linear(width, width)
            )

    @property
    def uses_clip(self) -> bool:
        return "clip" in (self.config.understanding, self.config.condition())

    @property
    def grid(self) -> int:
        """Codes on the side of a picture."""
        return self.config.image_size // self.vq.factor

    @property
    def image_tokens(self) -> int:
        return self.grid**2

    @property
    def clip_tokens(self) -> int:
        return (self.config.clip_tower.image_size // self.config.clip_tower.patch_size) ** 2

    @classmethod
    def load(cls, config: ShowOConfig, device: torch.device | str = "cpu") -> "ShowO":
        if config.weights is None:
            tokenizer = (
                AutoTokenizer.from_pretrained(fetch(config.tokenizer))
                if config.tokenizer
                else word_tokenizer(config.words, [prompt.END_OF_TEXT])
            )
            _add_specials(tokenizer)
            with torch.random.fork_rng(devices=[]), torch.device(device):
                torch.manual_seed(config.seed)
                return cls(config, tokenizer)
        folder = fetch(config.weights)
        tokenizer = AutoTokenizer.from_pretrained(fetch(config.tokenizer or str(folder / "tokenizer")))
        _add_specials(tokenizer)
        expected = convert.published(folder).get("vocab_size")
        with no_memory():
            model = cls(config, tokenizer)
        if expected not in (None, model.vocabulary.size):
            raise ValueError(
                f"{folder} has vocab_size {expected}, but tokenizer, image codes and mask make {model.vocabulary.size} "
                f"({len(tokenizer)} + {model.vq.entries} + 1); check model.tokenizer and the codec sizes"
            )
        state = convert.read(folder)
        put(model.showo, _part(state, "showo."), str(folder))
        known = ("showo.", "mm_projector.") if model.uses_clip else ("showo.",)
        if stray := sorted(n for n in state if not n.startswith(known)):
            raise ValueError(f"{folder} holds tensors this configuration has no place for: {stray[:8]}")
        if model.uses_clip:
            put(model.mm_projector, _part(state, "mm_projector."), f"{folder} (mm_projector)")
            source = fetch(config.clip or str(folder / "clip"))
            put(model.clip, convert.clip_native(convert.read(source), config.clip_tower), str(source))
        source = fetch(config.vq or str(folder / "vq"))
        put(model.vq, convert.read(source), str(source))
        return model.to(device)

    def views(self, kind: str) -> Views:
        config = self.config
        if kind == "i2t":
            if config.understanding == "vq":
                return Views(gen=None, und=View(config.image_size, fit="center_crop"))
            return Views(gen=None, und=View(config.clip_tower.image_size, fit="center_crop"))
        return Views(gen=View(config.image_size, fit="squash" if kind == "reca" else "center_crop"), und=None)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        """codes int64 [B, N] of gen; h_v: CLIP features fp32 [B, n, C] or condition codes int64 [B, G]."""
        if batch.kind == "i2t":
            pixels = _pixels(batch.und)
            h_v = self.vq.encode(pixels) if self.config.understanding == "vq" else self.look(_clip_norm(pixels))
            return {"h_v": h_v}
        pixels = _pixels(batch.gen)
        features = {"codes": self.vq.encode(pixels)}
        if batch.kind == "reca":
            source = self.config.condition()
            features["h_v"] = self.look(self.clip_view(pixels)) if source == "clip" else self.vq.encode(self.shrink(pixels))
        return features

    def clip_view(self, pixels: Tensor) -> Tensor:  # [B, 3, R, R] in [-1, 1]
        """What CLIP sees of the picture to reconstruct: resized without antialias, as the release does."""
        small = F.interpolate(pixels, size=[self.config.clip_tower.image_size] * 2, mode="bilinear")
        return small if self.config.clip_norm == "upstream" else _clip_norm(small)

    def shrink(self, pixels: Tensor) -> Tensor:
        """The bottleneck of the vq condition: a small copy, or one blurred by resizing it back."""
        size = pixels.shape[-1]
        small = F.interpolate(pixels, size=[size // self.config.hv_down_scale] * 2, mode="bilinear")
        return F.interpolate(small, size=[size] * 2, mode="bilinear") if self.config.hv_resize_back else small

    @torch.no_grad()
    def look(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S]
        """CLIP patch features before its last layer, fp32 [B, n, C]."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.clip(pixels.float()).last_hidden_state[:, 1:]

    def hidden(self, sequence: prompt.Sequence, src: Tensor, h_v: Tensor | None, learn: bool = True) -> Tensor:
        """Last hidden states [B, L, H] of a sequence whose ids, image codes filled in, are `src`.

        learn: whether token embeddings and projector get a gradient.
        """
        device = src.device
        with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
            embeddings = self.embed(src, h_v)
        allowed = sequence.allowed.to(device)
        return self.showo.model(inputs_embeds=embeddings, attention_mask=allowed, use_cache=False).last_hidden_state

    def embed(self, src: Tensor, h_v: Tensor | None) -> Tensor:
        """Input embeddings [B, L, H]; negative src are rows of the sample's projected CLIP features."""
        table = self.showo.model.embed_tokens.weight
        if h_v is None or not h_v.is_floating_point():
            return template_concat(table, table.new_empty(0, table.shape[1]), src)
        rows = torch.arange(len(src), device=src.device)[:, None] * h_v.shape[1]
        visual = self.mm_projector(h_v).to(table.dtype)
        return template_concat(table, visual.flatten(0, 1), torch.where(src < 0, src - rows, src))

    def loss(self, batch: Batch, features: dict[str, Any], draws: Draws) -> LossTerm:
        return {"reca": self.reca_loss, "t2i": self.t2i_loss, "i2t": self.i2t_loss}[batch.kind](batch, features, draws)

    def reca_loss(self, batch: Batch, features: dict[str, Any], draws: Draws) -> LossTerm:
        """Cross-entropy of the masked codes of the picture that h_v was made from."""
        codes, h_v = features["codes"], features["h_v"]
        templates = [prompt.template(self.tokenizer, text) for text in batch.text]
        n, v = codes.shape[1], self.vocabulary
        if h_v.is_floating_point():
            sequence = prompt.reca_clip(templates, v, self.config.reca_slots, h_v.shape[1], n)
            learn = not self.config.parity
        else:
            sequence, learn = prompt.reca_vq(templates, v, self.config.text_slots, h_v.cpu(), n), True
        masked = self.masked(draws, batch.sample_ids, n)
        src = self.fill(sequence, codes, masked)
        hidden = self.hidden(sequence, src, h_v, learn)[:, sequence.image]
        targets = torch.where(masked, codes + v.offset, prompt.IGNORE)
        return self.cross_entropy(hidden, targets)

    def t2i_loss(self, batch: Batch, features: dict[str, Any], draws: Draws) -> LossTerm:
        """Cross-entropy of the masked codes, and of the soi and eoi around them, from a caption."""
        codes, v = features["codes"], self.vocabulary
        drop = draws.uniform(Purpose.CONDITION_DROP, batch.sample_ids)[:, 0] < self.config.caption_drop
        texts = [[] if d else prompt.encode(self.tokenizer, t) for t, d in zip(batch.text, drop.tolist(), strict=True)]
        sequence = prompt.t2i(texts, v, self.config.text_slots, codes.shape[1])
        masked = self.masked(draws, batch.sample_ids, codes.shape[1])
        src = self.fill(sequence, codes, masked)
        around = slice(sequence.image.start - 1, sequence.image.stop + 1)
        hidden = self.hidden(sequence, src, None)[:, around]
        targets = src[:, around].clone()
        targets[:, 1:-1] = torch.where(masked, codes + v.offset, prompt.IGNORE)
        return self.cross_entropy(hidden, targets)

    def i2t_loss(self, batch: Batch, features: dict[str, Any], draws: Draws) -> LossTerm:
        """Next-token cross-entropy of the answers."""
        h_v = features["h_v"]
        sequence = self.question_sequence(*self.conversations(batch), h_v)
        src = sequence.src.to(h_v.device)
        hidden = self.hidden(sequence, src, h_v)[:, :-1]
        return self.cross_entropy(hidden, sequence.labels[:, 1:].to(h_v.device))

    def conversations(self, batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
        budget, v = self.config.answer_slots, self.vocabulary
        pairs = [prompt.conversation(self.tokenizer, turns, v, budget) for turns in batch.text]
        ids, labels = zip(*pairs, strict=True)
        if self.config.understanding == "vq":
            return [[v.bos, *row] for row in ids], [[prompt.IGNORE, *row] for row in labels]
        return list(ids), list(labels)

    def question_sequence(self, ids: list[list[int]], labels: list[list[int]], h_v: Tensor) -> prompt.Sequence:
        if not h_v.is_floating_point():
            return prompt.i2t_vq(ids, labels, self.vocabulary, h_v)
        system = prompt.encode(self.tokenizer, self.config.system_prompt)
        return prompt.i2t_clip(ids, labels, self.vocabulary, system, h_v.shape[1])

    def masked(self, draws: Draws, sample_ids: Tensor, n: int) -> Tensor:
        """Which codes are hidden, bool [B, n]: cos(pi/2 u) of them, at least one, by the release's argsort rule."""
        rate = torch.cos(draws.uniform(Purpose.MASK_RATE, sample_ids) * (math.pi / 2)).clamp(min=0)
        count = (n * rate).round().clamp(min=1)
        return draws.uniform(Purpose.MASK_ORDER, sample_ids, n).argsort(dim=-1) < count

    def fill(self, sequence: prompt.Sequence, codes: Tensor, masked: Tensor) -> Tensor:
        """The sequence's ids with the image codes in place, hidden ones as the mask token, int64 [B, L]."""
        v, src = self.vocabulary, sequence.src.to(codes.device, copy=True)
        src[:, sequence.image] = torch.where(masked, v.mask, codes + v.offset)
        return src

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> LossTerm:  # [B, n, H], [B, n]
        head = self.showo.lm_head
        total = masked_linear_cross_entropy(
            hidden.flatten(0, 1), head.weight, targets.flatten(), head.bias, reduction="sum"
        )
        return LossTerm(total, (targets != prompt.IGNORE).sum().float())

    def weight(self, batch: Batch, draws: Draws) -> Tensor:
        device = batch.sample_ids.device
        if batch.kind == "i2t":
            labels = self.conversations(batch)[1]
            return torch.tensor(float(sum(label != prompt.IGNORE for row in labels for label in row)), device=device)
        hidden = self.masked(draws, batch.sample_ids, self.image_tokens).sum().float()
        return hidden if batch.kind == "reca" else hidden + 2 * len(batch)

    def generate(self, prompts: list[str], seeds: list[int], **options: Any) -> list[Tensor]:
        texts = [prompt.encode(self.tokenizer, text) for text in prompts]
        codes = sampling.draw_codes(self, texts, seeds, **options)
        pixels = self.vq.decode(codes, self.grid, self.grid)
        return list(((pixels + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8))

    def answer(self, images: list[Tensor], questions: list[str], max_new_tokens: int = 100) -> list[str]:
        size = self.views("i2t").und.size
        pixels = torch.cat([_fit(image, size) for image in images]).to(self.showo.device)
        h_v = self.vq.encode(pixels) if self.config.understanding == "vq" else self.look(_clip_norm(pixels))
        return sampling.answer(self, h_v, questions, max_new_tokens)

    def export(self, folder: Path) -> None:
        """config.json and pytorch_model.safetensors as Show-o publishes them; the frozen parts in folders beside."""
        state = {n: t for n, t in self.state_dict().items() if n.startswith(("showo.", "mm_projector."))}
        v = self.vocabulary
        config = {
            "_class_name": "Showo",
            "codebook_size": v.codes,
            "llm_model_path": "microsoft/phi-1_5",
            "llm_vocab_size": v.offset - len(prompt.SPECIAL_TOKENS),
            "load_from_showo": True,
            "mask_token_id": v.mask,
            "num_vq_tokens": self.image_tokens,
            "vocab_size": v.size,
            "w_clip_vit": self.uses_clip,
        }
        convert.write(folder, config, state)
        convert.write(folder / "vq", {}, self.vq.state_dict())
        if self.uses_clip:
            convert.write(folder / "clip", self.clip.config.to_dict(), self.clip.state_dict())
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def roles(self) -> dict[str, str]:
        roles = {}
        for name, _ in self.named_parameters():
            if name.startswith("vq."):
                roles[name] = "codec"
            elif name.startswith("clip."):
                roles[name] = "und_encoder"
            elif name.startswith("mm_projector."):
                roles[name] = "bridge"
            else:
                roles[name] = "embed" if name.startswith(("showo.lm_head", "showo.model.embed_tokens")) else "shared_lm"
        return roles

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return "bias" not in name if self.config.parity else parameter.ndim >= 2 and "embed_tokens" not in name

    def blocks(self) -> list[nn.Module]:
        return list(self.showo.model.layers)

    def hazards(self) -> list[str]:
        config = self.config
        if config.condition() == "vq" and (config.hv_down_scale == 1):
            return [
                "h_v is the picture's own codes at full resolution: the model can copy them and collapses. Shrink "
                "(model.hv_down_scale=2) or blur (model.hv_resize_back=true) the condition"
            ]
        return []


def _phi(config: ShowOConfig, vocab_size: int) -> PhiConfig:
    phi = config.phi
    return PhiConfig(
        vocab_size=vocab_size,
        hidden_size=phi.hidden_size,
        num_hidden_layers=phi.num_hidden_layers,
        num_attention_heads=phi.num_attention_heads,
        intermediate_size=phi.intermediate_size,
        hidden_act=phi.hidden_act,
        layer_norm_eps=phi.layer_norm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": phi.rope_theta,
            "partial_rotary_factor": phi.partial_rotary_factor,
        },
        max_position_embeddings=2048,
        qk_layernorm=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _clip(config: ShowOConfig) -> CLIPVisionConfig:
    """The tower without its last layer: h_v is what goes into that layer."""
    clip = config.clip_tower
    return CLIPVisionConfig(
        hidden_size=clip.hidden_size,
        num_hidden_layers=clip.num_hidden_layers - 1,
        num_attention_heads=clip.num_attention_heads,
        intermediate_size=clip.intermediate_size,
        image_size=clip.image_size,
        patch_size=clip.patch_size,
        hidden_act=clip.hidden_act,
        layer_norm_eps=1e-5,
    )


def _add_specials(tokenizer) -> None:
    """Show-o's tokens, in the order that fixes their ids; a tokenizer that has them all is left alone."""
    new = [token for token in prompt.SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if new and len(new) < len(prompt.SPECIAL_TOKENS):
        raise ValueError(f"the tokenizer has some of Show-o's special tokens but lacks {', '.join(new)}")
    tokenizer.add_tokens(new, special_tokens=True)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _pixels(images: list[Tensor]) -> Tensor:
    return torch.stack(images).float() / 127.5 - 1


def _clip_norm(pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def _fit(image: Tensor, size: int) -> Tensor:  # uint8 [3, H, W]
    """An image at inference: short side to `size`, the middle square, [1, 3, size, size] in [-1, 1]."""
    height, width = image.shape[1:]
    scale = size / min(height, width)
    sides = [max(size, round(height * scale)), max(size, round(width * scale))]
    whole = F.interpolate(image[None].float(), size=sides, mode="bicubic", antialias=True).clamp(0, 255).round()
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    return whole[:, :, top : top + size, left : left + size] / 127.5 - 1
