"""Every option of the toolkit: name, default, help, choices and check, in one place; flags and docs are made from it.

All configs check themselves when built and when changed; a bad value raises ConfigError (GenerationConfig: RequestError) with field, value and limit.
Unknown names raise. A config remembers which fields the caller gave (`given`), because two rules need it: an option without
effect is reported only if asked for, and `do_sample` unset means "sample if temperature, top_p or top_k was given".
This module must not import torch: `lmdeploy --help` reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass
from typing import Any, Literal

from lmdeploy.checked import CheckedOptions, QuantPolicy, above, at_least, between, is_number, option, policy_problem, remembers_given, shown
from lmdeploy.errors import ConfigError, RequestError
from lmdeploy.grammar import Grammar, check_grammar, grammar_of
from lmdeploy.log import get_logger

DTYPES = ("auto", "float32", "float16", "bfloat16")
MODEL_FORMATS = ("hf", "llama", "awq", "gptq", "smooth-quant", "fp8", "compressed-tensors", "mxfp4")
#: those of them that this version loads
LOADED_FORMATS = ("hf", "awq", "gptq", "smooth-quant", "fp8", "compressed-tensors")
BACKENDS = ("turbomind", "pytorch")
#: far above any machine; thread counts that the system refuses would end the process without a word
MAX_CPU_THREADS = 1024

#: Options of the system's public surface that this version cannot obey yet: name -> the values that mean "not used".
#: Any other value is an error, never silence.
UNUSED_VALUES: dict[str, tuple[Any, ...]] = {
    "tp": (1,), "dp": (1,), "cp": (1,), "ep": (1,), "nnodes": (1,), "node_rank": (0,), "dist_init_addr": (None,), "devices": (None,),
    "adapters": (None,), "num_cpu_blocks": (0,), "custom_module_map": (None,), "empty_init": (False,),
    "distributed_executor_backend": (None, "uni"),
}  # fmt: skip


@remembers_given
@dataclass
class EngineConfig(CheckedOptions):
    """Options of the engine. `TurbomindEngineConfig` and `PytorchEngineConfig` are the names that users build."""

    dtype: str = option(
        "auto",
        "type of weights and activations; auto: on CPU bfloat16 where it is fast, else float32; on CUDA the checkpoint's own 16-bit type",
        choices=DTYPES,
    )
    model_format: str | None = option(
        None, f"weight layout: {', '.join(LOADED_FORMATS)}; default: what the files are. fp8 also quantises a 16-bit model at load", choices=MODEL_FORMATS
    )
    tp: int = option(1, "tensor-parallel ranks", check=at_least(1))
    session_len: int | None = option(None, "longest prompt + answer in tokens; default: the model's own limit", check=between(1, 1 << 31))
    max_batch_size: int | None = option(None, "most sequences computed together; default: 32 on CPU, 256 on GPU", check=between(1, 65536))
    cache_max_entry_count: float = option(
        0.8,
        "KV cache: below 1 the share of the memory that is free after weights and workspace, from 1 a number of blocks. On CPU, when not given, also no more than "
        "max_batch_size full sessions need",
        check=above(0),
    )
    cache_block_seq_len: int = option(64, "tokens per KV block", check=between(1, 1024))
    enable_prefix_caching: bool = option(True, "reuse the KV blocks of equal prompt beginnings")
    quant_policy: QuantPolicy = option(
        0, "KV cache: 0 = none (16 bit), 8 = int8, k8v4 = keys int8 and values int4, 4 = int4, fp8 = float8 (CUDA, capability 8.9)", check=policy_problem
    )
    kv_rotation: bool | None = option(
        None, "rotate keys and values before they are quantised, so that outlier channels cost no accuracy; default: where keys or values have 4 bits"
    )
    strict_quality: bool = option(False, "refuse to start when a 4-bit KV cache costs the model too much accuracy (else a warning says so)")
    rope_scaling_factor: float = option(0.0, "dynamic NTK factor for prompts beyond the training length; 0 = as config.json says", check=at_least(0))
    use_logn_attn: bool = option(False, "scale queries beyond the training length by log(position)/log(training length)")
    max_prefill_token_num: int = option(8192, "most tokens computed in one step; on CPU 1024 when not given", check=between(1, 1 << 20))
    device_type: str = option("auto", "where to run; auto: cuda if there is one, else cpu", choices=("auto", "cuda", "cpu"))
    vision_max_batch_size: int = option(1, "tiles of pictures that pass the vision part together", check=between(1, 256))
    eager_mode: bool = option(False, "no CUDA graphs, and no step launched before the tokens of the last one are seen")
    download_dir: str | None = option(None, "where the hub's files are kept")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    hf_overrides: dict[str, Any] | None = option(None, "values that replace config.json's", flag=False)
    model_name: str | None = option(None, "name of a built-in chat template (old spelling of ChatTemplateConfig.model_name)", flag=False)
    max_waiting: int = option(4096, "requests that may wait; one more is refused", check=at_least(1))
    random_weights: bool = option(False, "fill the model of a config folder with random weights (benchmarks)", flag=False)
    cpu_threads: int | None = option(None, "threads of the CPU kernels; default: all cores of the process", check=between(1, MAX_CPU_THREADS))
    head_bits: int = option(
        16, "output head: 8 or 4 quantise it at load; decoding then reads less. With tied embeddings that is a copy, which takes memory", choices=(16, 8, 4)
    )
    quantise_activations: bool = option(True, "activations in 8 bits too where the checkpoint was made for it; False: only its weights")
    # Accepted for compatibility; only the values in UNUSED_VALUES, others raise.
    dp: int = option(1, "data-parallel groups", flag=False)
    cp: int = option(1, "context-parallel ranks", flag=False)
    ep: int = option(1, "expert-parallel ranks", flag=False)
    nnodes: int = option(1, "machines", flag=False)
    node_rank: int = option(0, "this machine", flag=False)
    dist_init_addr: str | None = option(None, "address of rank 0", flag=False)
    devices: list[int] | None = option(None, "device numbers", flag=False)
    adapters: dict[str, str] | None = option(None, "LoRA adapters", flag=False)
    num_cpu_blocks: int = option(0, "host blocks", flag=False)
    custom_module_map: dict[str, Any] | None = option(None, "replaced modules", flag=False)
    empty_init: bool = option(False, "start without weights", flag=False)
    distributed_executor_backend: str | None = option(None, "uni, mp or ray", flag=False)

    backend = "turbomind"

    #: historical or foreign spelling -> today's name
    ALIASES = {
        "block_size": "cache_block_seq_len",
        "num_gpu_blocks": "cache_max_entry_count",
        "max_num_seqs": "max_batch_size",
    }
    #: accepted and without effect here, for a reason that the user is told once
    NO_EFFECT = {
        "cache_chunk_size": "the KV pool is always allocated at once",
        "num_tokens_per_iter": "max_prefill_token_num bounds a step",
        "max_prefill_iters": "long prompts are always split by max_prefill_token_num",
        "prefill_interval": "prefill and decoding share every step",
        "eviction_type": "pre-empted sequences are recomputed",
        "thread_safe": "the engine may always be called from any thread",
        "communicator": "there is one rank",
        "async_": "steps are scheduled by one loop",
        "enable_metrics": "metrics are always on",
        "kernel_block_size": "kernels use cache_block_seq_len",
        "logprobs_mode": "logprobs are always available and are those of the raw logits",
    }

    def __post_init__(self) -> None:
        self._check(lambda _, text: ConfigError(f"{type(self).__name__}: {text}"))
        count = self.cache_max_entry_count
        if count >= 1 and count != int(count):
            raise ConfigError(f"cache_max_entry_count={count} is neither a share below 1 nor a whole number of blocks")
        for name, allowed in UNUSED_VALUES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not available in this version of lmdeploy; use {name}={allowed[0]!r}")
        if self.model_format not in (None, *LOADED_FORMATS):
            raise ConfigError(f"model_format={self.model_format!r} is not available in this version of lmdeploy; known: {', '.join(LOADED_FORMATS)}")

    @classmethod
    def _translate(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name == "num_gpu_blocks" and not value:
                continue  # 0 = automatic
            if name in cls.NO_EFFECT:
                if value not in (None, "", -1, 0, False, True, 1):  # these are the historical defaults
                    get_logger(__name__).warning("%s=%r has no effect: %s", name, value, cls.NO_EFFECT[name])
                continue
            out[cls.ALIASES.get(name, name)] = value
        return out


class TurbomindEngineConfig(EngineConfig):
    """Engine options with the fast kernel set (C++ for AMX, AVX-512 and AVX2 on CPU; on CUDA plain torch in this version). The default."""

    backend = "turbomind"


class PytorchEngineConfig(EngineConfig):
    """Engine options with the plain-torch kernel set, on any device."""

    backend = "pytorch"


@dataclass(frozen=True)
class VisionConfig:
    """Options of the vision part (used by vision-language models)."""

    max_batch_size: int = 1
    thread_safe: bool = False


MAX_STOP_WORDS = 64
MAX_WORD_CHARS = 8192  # of all words of one option together: an automaton is built of them
MAX_N = 128
MAX_LOGPROBS = 1024
#: below it, dividing logits by the temperature leaves the likeliest token alone, or float32's range
MIN_TEMPERATURE = 1e-5


def _words(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(w, str) for w in value):
        return "must be a list of strings"
    if len(value) > MAX_STOP_WORDS:
        return f"has {len(value)} entries; at most {MAX_STOP_WORDS} are allowed"
    if (total := sum(map(len, value))) > MAX_WORD_CHARS:
        return f"has {total} characters; at most {MAX_WORD_CHARS} are allowed"
    return "contains an empty string" if any(not w for w in value) else None


def _ids(value: Any) -> str | None:
    ok = value is None or (isinstance(value, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value))
    return None if ok else "must be a list of token ids >= 0"


@remembers_given
@dataclass
class GenerationConfig(CheckedOptions):
    """How to answer one prompt. Raises RequestError naming field, value and limit."""

    n: int = option(1, "answers per prompt", check=between(1, MAX_N))
    max_new_tokens: int | None = option(512, "longest answer in tokens; None = all that fits in session_len", check=at_least(1))
    do_sample: bool | None = option(None, "True: sample; False: greedy; not given: sample if temperature, top_p or top_k is given")
    top_p: float = option(1.0, "sample among the likeliest tokens with this total probability", check=between(0, 1))
    top_k: int = option(50, "sample among this many likeliest tokens; 0 = all, 1 = greedy", check=at_least(0))
    min_p: float = option(0.0, "drop tokens below this share of the likeliest one's probability", check=between(0, 1))
    temperature: float = option(0.8, "0 = greedy; higher is more random", check=between(0, 2))
    repetition_penalty: float = option(1.0, "above 1: tokens of the prompt and answer become less likely", check=between(0.01, 100))
    presence_penalty: float = option(0.0, "subtracted from the logit of tokens already in the answer", check=between(-2, 2))
    frequency_penalty: float = option(0.0, "subtracted once per occurrence in the answer", check=between(-2, 2))
    ignore_eos: bool = option(False, "never stop before max_new_tokens")
    random_seed: int | None = option(None, "same seed, same answer; not given: a new one each time", check=between(0, 2**63 - 1))
    stop_words: list[str] | None = option(None, "text that ends the answer, beside the template's own", check=_words)
    bad_words: list[str] | None = option(None, "text that is never produced", check=_words)
    stop_token_ids: list[int] | None = option(None, "token ids that end the answer, beside the model's own", check=_ids)
    bad_token_ids: list[int] | None = option(None, "token ids that are never produced", check=_ids)
    min_new_tokens: int | None = option(None, "no stop before this many tokens", check=at_least(0))
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    spaces_between_special_tokens: bool = option(True, "separate special tokens by spaces in the text")
    logprobs: int | None = option(None, "log-probabilities of this many likeliest tokens per place", check=between(0, MAX_LOGPROBS))
    prompt_logprobs: int | None = option(None, "the same for the prompt's tokens", check=between(0, MAX_LOGPROBS))
    logit_bias: dict[int, float] | None = option(None, "token id -> number added to its logit, -100..100")
    include_stop_str_in_output: bool = option(False, "keep the stop word in the text")
    output_logits: str | None = option(None, "return raw logits", choices=("all", "generation"))
    output_last_hidden_state: str | None = option(None, "return the last hidden state", choices=("all", "generation"))
    response_format: dict[str, Any] | None = option(None, "form of the answer: {'type': 'json_object'}, json_schema, regex, ebnf or choice", flag=False)
    grammar: Grammar | None = option(None, "the same as a Grammar, for callers inside lmdeploy", flag=False)
    logits_processors: list[Any] | None = option(None, "callables on logits")
    repetition_ngram_size: int = option(0, "stop when the last n-gram repeats (0 = off)", check=at_least(0))
    repetition_ngram_threshold: int = option(0, "how often it must repeat (0 = off)", check=at_least(0))

    def __post_init__(self) -> None:
        self._check(lambda name, text: RequestError(text, param=name))
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or token < 0 or not is_number(bias) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias[{token!r}]={bias!r}: ids are whole numbers >= 0, values in [-100, 100]", param="logit_bias")
        if self.grammar is not None:
            check_grammar(self.grammar)
        if grammar_of(self.response_format) is not None and self.grammar is not None:
            raise RequestError("response_format and grammar exclude each other; give one", param="response_format")
        for name in ("logits_processors", "repetition_ngram_size", "repetition_ngram_threshold"):
            if getattr(self, name):
                raise RequestError(f"{name} is not available in this version of lmdeploy; leave it out", param=name, code="unsupported")

    @property
    def samples(self) -> bool:
        """True when tokens are drawn at random; see `do_sample`."""
        if self.temperature < MIN_TEMPERATURE or self.top_k == 1 or self.do_sample is False:
            return False
        return bool(self.do_sample) or bool(self.given & {"temperature", "top_p", "top_k"})


@dataclass(frozen=True)
class ChatTemplateConfig:
    """Overrides the checkpoint's chat template: a built-in one by `model_name`, and any part of it.

    `meta_instruction=None` keeps the template's default system text, '' prints an empty system block.
    """

    model_name: str | None = None
    model_path: str | None = None
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    separator: str | None = None
    tool: str | None = None
    eotool: str | None = None
    capability: Literal["completion", "infilling", "chat", "python"] | None = None
    stop_words: list[str] | None = None

    @classmethod
    def from_json(cls, file_or_string: str) -> ChatTemplateConfig:
        """From a JSON file or JSON text; unknown keys raise ConfigError naming the nearest."""
        import json

        is_file = os.path.isfile(file_or_string)
        source = file_or_string if is_file else shown(file_or_string)
        text = file_or_string
        try:
            if is_file:
                with open(file_or_string, encoding="utf-8") as f:
                    text = f.read(1 << 20)
            values = json.loads(text)
        except ValueError as e:
            problem = "not valid JSON" if is_file else "neither a file nor valid JSON"
            raise ConfigError(f"chat template: {source} is {problem} ({e})") from e
        if not isinstance(values, dict):
            raise ConfigError(f"chat template: {source} must hold a JSON object, not {type(values).__name__}")
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, 1) or names
                raise ConfigError(f"chat template: unknown key '{key}' in {source}; did you mean {', '.join(near)}?")
        return cls(**values)

    def to_json(self, file_path: str | None = None) -> str:
        """JSON text of the parts that are set; also written to `file_path` when given."""
        import json

        text = json.dumps({k: v for k, v in dataclasses.asdict(self).items() if v is not None}, ensure_ascii=False, indent=2)
        if file_path:
            with open(file_path, "w", encoding="utf-8") as f:
                f.write(text)
        return text
