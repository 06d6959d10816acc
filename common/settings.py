"""Every option of every process, declared once: flag, environment name, default and help come from here.

A flag wins over the environment, the environment over the default; there is no configuration file. TGI's options keep
their bare environment names (`MODEL_ID`, `PORT`), ours start with `INFERFLEET_`.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from common.adapters import read_sources
from common.errors import ConfigurationError

SettingsType = TypeVar("SettingsType", bound=BaseSettings)

WITHOUT_MEANING: dict[str, tuple[int, str]] = {
    "validation-workers": (1, "tokenisation runs in the gateway's own threads"),
    "waiting-served-ratio": (1, "prefill chunks and decode steps share every batch"),
    "max-waiting-tokens": (1, "prefill chunks and decode steps share every batch"),
    "max-batch-total-tokens": (1, "it follows from the memory for KV blocks"),
    "max-batch-size": (1, "use --max-num-seqs"),
    "prometheus-port": (1, "metrics are on the gateway's port and on --metrics-port of a worker"),
    "shard-uds-path": (1, "there are no shard sockets"),
    "master-addr": (1, "ranks find each other by themselves; use --rendezvous for those of several machines"),
    "master-port": (1, "ranks find each other by themselves; use --rendezvous for those of several machines"),
    "weights-cache-override": (1, "use --huggingface-hub-cache"),
    "disable-custom-kernels": (0, "there are no kernels to disable on this path"),
    "watermark-gamma": (1, "watermarks are not applied"),
    "watermark-delta": (1, "watermarks are not applied"),
    "ngrok": (0, "TGI's own ngrok tunnel no longer works either"),
    "ngrok-authtoken": (1, "TGI's own ngrok tunnel no longer works either"),
    "ngrok-edge": (1, "TGI's own ngrok tunnel no longer works either"),
    "disable-grammar-support": (0, "grammars are refused in this version"),
    "usage-stats": (1, "no usage statistics are ever sent"),
    "otlp-endpoint": (1, "traces are not exported in this version"),
    "otlp-service-name": (1, "traces are not exported in this version"),
    "max-image-fetch-size": (1, "images are not accepted"),
}
"""TGI's (and a few of vLLM's) options that parse but change nothing: number of values and the reason that is shown."""


Quantize = Literal[
    "none",
    "int8",
    "int4",
    "fp8",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "gptq",
    "awq",
    "compressed-tensors",
]
QUANTIZE_ALIASES = {
    "eetq": "int8",
    "gptq_marlin": "gptq",
    "awq_marlin": "awq",
    "fbgemm_fp8": "fp8",
    "bitsandbytes_nf4": "bitsandbytes-nf4",
    "bitsandbytes_fp4": "bitsandbytes-fp4",
}
"""TGI's and vLLM's names of the same arithmetic by other kernels, and TGI's other spelling."""


POSSIBLE_NUMBERS = {"bits": (2, 4, 8), "group_size": (-1, 32, 64, 128, 256)}
USERS_OF_OPTIONS = {
    "bits": ("gptq",),
    "group_size": ("gptq", "int4"),
    "desc_act": ("gptq",),
    "calibration": ("gptq",),
    "calibration_tokens": ("gptq",),
}
"""What options of `inferfleet prepare` belong to, by values of --quantize."""


def option(default: Any, help_text: str, *names: str, **extra: Any) -> Any:
    """A setting. With `names` the first is its bare environment and flag name, the others are aliases."""
    if names:
        extra["validation_alias"] = AliasChoices(*names)
    return Field(default, description=help_text, **extra)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return text == "localhost"
    return True


class _Environment(EnvSettingsSource):
    """The environment without a HOSTNAME that shells and container engines set to the machine's own name."""

    def _load_env_vars(self) -> Any:
        found = dict(super()._load_env_vars())
        if not _is_address(found.get("hostname") or "localhost"):
            del found["hostname"]
        return {name: value for name, value in found.items() if value != ""}


def _split_commas(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list):
        # numbers of a command line come as such
        return [piece for part in value for piece in (_split_commas(part) if isinstance(part, str) else [part])]
    return value


Names = Annotated[list[str], NoDecode, BeforeValidator(_split_commas)]
GPUS = Path("/proc/driver/nvidia/gpus")
MAX_RANKS = 1024
MAX_SPECULATE = 64
SHORT_DTYPES = {"half": "float16", "float": "float32", "fp8": "fp8_e4m3fn", "fp8_e4m3": "fp8_e4m3fn"}

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


MAX_TOKENS = 10_000_000


def read_token_range(text: str) -> range:
    """`64` or `16-512`, both ends included.

    Raises:
        ValueError: it is neither, or a length that nothing has.
    """
    low, dash, high = text.strip().partition("-")
    numbers = [low, high if dash else low]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError(f"must be a number or two with a dash between, such as 16-512, not {text!r}")
    first, last = map(int, numbers)
    if not 0 < first <= last <= MAX_TOKENS:
        raise ValueError(f"must be from 1 to {MAX_TOKENS}, the smaller number first, not {text!r}")
    return range(first, last + 1)


def _checked_token_range(text: str) -> str:
    read_token_range(text)
    return text


TokenRange = Annotated[str, AfterValidator(_checked_token_range)]
MAX_LEVELS = 64
Counts = Annotated[
    list[Annotated[int, Field(gt=0, le=10_000)]],
    NoDecode,
    BeforeValidator(_split_commas),
    Field(min_length=1, max_length=MAX_LEVELS),
]
GraphSizes = Annotated[
    list[Annotated[int, Field(ge=0, le=4096)]],
    NoDecode,
    BeforeValidator(_split_commas),
    Field(max_length=512),
]
Rates = Annotated[
    list[Annotated[float, Field(gt=0, le=100_000)]],
    NoDecode,
    BeforeValidator(_split_commas),
    Field(max_length=MAX_LEVELS),
]


def gpus() -> list[str]:
    """CUDA devices that a process here would see, by their names in CUDA_VISIBLE_DEVICES, without loading anything to
    ask for them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(GPUS.iterdir())] if GPUS.is_dir() else []


def _is_host_and_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16


class _Settings(BaseSettings):
    """How options are read, whatever they are."""

    model_config = SettingsConfigDict(
        env_prefix="INFERFLEET_",
        extra="ignore",
        populate_by_name=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)


class CommonSettings(_Settings):
    """Options of every process."""

    redis_url: SecretStr | None = option(
        None, "Redis or Valkey >= 7.0 as redis://, rediss:// or unix://; none: `up` starts its own", "redis_url"
    )
    data_dir: str = option(".inferfleet", "folder for the embedded Redis and its append-only file")
    json_output: bool = option(False, "log JSON lines", "json_output")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "info", "least severe messages to log", "log_level"
    )
    lease: PositiveFloat = option(6.0, "seconds without a heartbeat after which a worker is declared dead")
    ephemeral: bool = option(False, "no append-only file, and results are erased 60 s after their end")
    max_attempts: PositiveInt = option(3, "deaths of a worker, without a new token, after which a job is a dead letter")

    @field_validator("log_level", "sharded", mode="before", check_fields=False)
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value


class GatewaySettings(CommonSettings):
    """Options of `inferfleet gateway`."""

    hostname: str = option("127.0.0.1", "address to listen on", "hostname", "host")
    port: Annotated[int, Field(ge=0, le=65535)] = option(8080, "port to listen on", "port", "p")
    gateway_id: str = option("", "name of this gateway on Redis; random when empty", max_length=64)
    api_key: SecretStr | None = option(None, "key of tenant `default`, which may also administer", "api_key")
    max_concurrent_requests: PositiveInt = option(
        1024, "requests one gateway holds open at a time; above it 429", "max_concurrent_requests"
    )
    max_best_of: PositiveInt = option(2, "largest `best_of`", "max_best_of")
    max_stop_sequences: PositiveInt = option(4, "stop sequences per request", "max_stop_sequences")
    max_top_n_tokens: Annotated[int, Field(ge=0, le=100)] = option(5, "largest `top_n_tokens`", "max_top_n_tokens")
    max_client_batch_size: PositiveInt = option(4, "prompts per /v1/completions request", "max_client_batch_size")
    payload_limit: PositiveInt = option(2_000_000, "bytes of a request body", "payload_limit")
    cors_allow_origin: Names = option(["*"], "origins that browsers may call from", "cors_allow_origin")
    disconnect_grace: Annotated[float, Field(ge=0)] = option(
        10.0, "seconds that a request lives on after its client has gone"
    )
    keep_alive: PositiveFloat = option(15.0, "seconds of silence on a stream before a comment is sent")
    max_queued_tokens: PositiveInt = option(1_000_000, "tokens that may wait per model before submissions get 429")
    max_jobs_per_tenant: PositiveInt = option(10_000, "unfinished jobs of one tenant before it gets 429")
    metrics_need_key: bool = option(False, "guard /metrics by the API key")


class WorkerSettings(CommonSettings):
    """Options of `inferfleet worker`."""

    model_id: str = option("", "local folder or hub id; empty: the built-in demo model", "model_id", "model")
    revision: str | None = option(None, "branch, tag or commit of a hub id", "revision")
    served_model_name: Names = option([], "names clients may use for the model", "served_model_name")
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = option(
        "auto", "type of weights and KV; auto: as in the checkpoint", "dtype"
    )
    load_format: Literal["auto", "dummy"] = option("auto", "dummy: random weights of the model's shape", "load_format")
    num_shard: Annotated[int, Field(ge=1, le=MAX_RANKS)] = option(
        1, "ranks of tensor parallelism, one process each", "num_shard", "tensor_parallel_size"
    )
    sharded: Literal["true", "false"] | None = option(
        None, "true without --num-shard: one rank for each GPU", "sharded"
    )
    num_nodes: Annotated[int, Field(ge=1, le=MAX_RANKS)] = option(
        1, "machines that share the ranks evenly; each runs the same command with a --node-rank of its own"
    )
    node_rank: Annotated[int, Field(ge=0)] = option(0, "number of this machine; only number 0 needs Redis")
    rendezvous: str = option(
        "", "HOST:PORT of machine 0 where the others come; all of them must reach each other, and nobody else"
    )
    quantize: Quantize | None = option(
        None, "weights in few bits; without it: as the checkpoint says", "quantize", "quantization"
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8_e4m3fn", "fp8_e5m2"] = option(
        "auto", "type of the KV cache; auto: that of the model, fp8 and fp8_e4m3: fp8_e4m3fn", "kv_cache_dtype"
    )
    speculate: Annotated[int, Field(ge=0, le=MAX_SPECULATE)] = option(
        0,
        "most tokens that a step guesses ahead for a request out of its own ones; tried where it pays only, and "
        "changes no answer; 0: none",
        "speculate",
    )
    lora_adapters: Names = option(
        [],
        "adapters in PEFT's format, as name=folder, name=owner/name or owner/name of a hub; @revision may follow",
        "lora_adapters",
    )
    max_loras: Annotated[int, Field(gt=0, le=256)] = option(8, "different adapters in one batch", "max_loras")
    max_lora_rank: Annotated[int, Field(gt=0, le=1024)] = option(64, "largest rank of an adapter", "max_lora_rank")
    rope_scaling: Literal["linear", "dynamic"] | None = option(
        None,
        "how rope is stretched, whatever the config says; linear where only --rope-factor is given",
        "rope_scaling",
    )
    rope_factor: Annotated[float, Field(ge=1)] | None = option(
        None, "how many times longer requests may get by that; 1 where only --rope-scaling is given", "rope_factor"
    )
    enable_prefill_logprobs: bool = option(False, "logprobs of the prompt", "enable_prefill_logprobs")
    trust_remote_code: bool = option(False, "accepted, but code from a checkpoint is never run", "trust_remote_code")
    max_input_tokens: PositiveInt | None = option(None, "longest prompt", "max_input_tokens", "max_input_length")
    max_total_tokens: PositiveInt | None = option(
        None, "longest prompt and output together", "max_total_tokens", "max_model_len"
    )
    max_batch_prefill_tokens: PositiveInt | None = option(
        None, "prompt tokens per engine step", "max_batch_prefill_tokens", "max_num_batched_tokens"
    )
    prefill_step: Annotated[float, Field(ge=0)] = option(
        0.2, "seconds that a step may last for prompts while others decode, whom they at most slow by half; 0: no bound"
    )
    max_num_seqs: Annotated[int, Field(gt=0, le=4096)] = option(256, "requests in one batch", "max_num_seqs")
    kv_tokens: PositiveInt | None = option(None, "tokens of KV cache; none: chosen from the free memory")
    block_size: Literal[8, 16, 32, 64, 128] = option(16, "tokens per KV block", "block_size")
    prefix_caching: bool = option(
        True,
        "reuse the KV of equal prompt beginnings; changes nothing for encoder-decoder models, which have none to share",
        "prefix_caching",
        "enable_prefix_caching",
    )
    device: Literal["auto", "cuda", "cpu"] = option(
        "auto", "where the model runs; auto: on a GPU where torch sees one, each rank of a machine on its own"
    )
    cuda_memory_fraction: Annotated[float, Field(gt=0, le=1)] = option(
        0.95,
        "part of a GPU's memory that may be taken, by others and by the KV cache, which gets what weights and the "
        "largest step leave of it",
        "cuda_memory_fraction",
        "gpu_memory_utilization",
    )
    cuda_graphs: GraphSizes = option(
        [],
        "numbers of requests for which a decoding step on a GPU is launched as a whole, such as 1,2,4,8; none: chosen; "
        "0: never",
        "cuda_graphs",
    )
    overlap: bool = option(
        True, "begin the next step on a GPU before the last one's tokens are read; without it errors are easier to find"
    )
    attention: Literal["auto", "cpu", "reference", "triton", "flash", "torch"] = option(
        "auto",
        "attention implementation; auto: our kernels where there are some, else torch's (cpu); on a GPU "
        "flash-attn (flash) where it is installed, torch's own (torch) when asked for, and ours (triton) for all else",
    )
    cpu_kernels: Literal["auto", "amx", "avx512_bf16", "avx512", "avx2", "off"] = option(
        "auto", "instruction set that C++ kernels are compiled for; off: torch alone"
    )
    worker_id: str = option("", "name of this worker on Redis; random when empty", max_length=64)
    threads: Annotated[int, Field(ge=0)] = option(
        0, "CPU threads of the engine, all its ranks here together; 0: all cores this worker may use"
    )
    step_limit: PositiveFloat = option(60.0, "seconds after which a step that does not end kills the engine")
    graceful_termination_timeout: Annotated[float, Field(ge=0)] = option(
        90.0, "seconds that running jobs get to finish at SIGTERM", "graceful_termination_timeout", "g"
    )
    chat_template: str | None = option(None, "file with a chat template that replaces the model's", "chat_template")
    tokenizer_config_path: str | None = option(
        None, "tokenizer_config.json whose chat template replaces the model's", "tokenizer_config_path"
    )
    huggingface_hub_cache: str | None = option(None, "folder for downloads from the hub", "huggingface_hub_cache")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = option(0, "port of this worker's own metrics; 0: none")

    @field_validator("lora_adapters")
    @classmethod
    def _check_adapters(cls, value: list[str]) -> list[str]:
        read_sources(value)
        return value

    @property
    def adapter_sources(self) -> dict[str, str]:
        """Sources of `lora_adapters` by their names."""
        return read_sources(self.lora_adapters)

    @field_validator("enable_prefill_logprobs")
    @classmethod
    def _not_in_this_version(cls, value: bool) -> bool:
        if value:
            raise ValueError("is not available in this version")
        return value

    @field_validator("quantize", mode="before")
    @classmethod
    def _known_as(cls, value: Any) -> Any:
        return QUANTIZE_ALIASES.get(value, value)

    @field_validator("dtype", "kv_cache_dtype", mode="before")
    @classmethod
    def _short_dtype(cls, value: Any) -> Any:
        return SHORT_DTYPES.get(value, value)

    @field_validator("cuda_graphs")
    @classmethod
    def _none_or_some(cls, value: list[int]) -> list[int]:
        if 0 in value and len(value) > 1:
            raise ValueError("0 is for none at all and cannot stand with others")
        return value

    @property
    def ranks_per_node(self) -> int:
        return self.num_shard // self.num_nodes

    @property
    def local_ranks(self) -> range:
        """Those of this machine."""
        return range(self.num_shard)[self.node_rank * self.ranks_per_node :][: self.ranks_per_node]

    @model_validator(mode="after")
    def _resolve_sharded(self) -> Self:
        """TGI's rules for its two options."""
        if self.sharded == "true" and "num_shard" not in self.model_fields_set:
            self.num_shard = len(gpus())
            if self.num_shard < 2:
                raise ValueError(f"--sharded true is one rank for each of {self.num_shard} GPUs; give --num-shard")
        elif self.sharded is not None and (self.sharded == "true") != (self.num_shard > 1):
            raise ValueError(f"--sharded {self.sharded} contradicts --num-shard {self.num_shard}; give only one")
        return self

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        if self.num_nodes == 1 and (self.node_rank or self.rendezvous):
            raise ValueError("--node-rank and --rendezvous are for several machines; give --num-nodes too")
        if self.node_rank >= self.num_nodes:
            raise ValueError(f"--node-rank {self.node_rank} must be below --num-nodes {self.num_nodes}")
        if self.num_shard % self.num_nodes:
            raise ValueError(f"--num-shard {self.num_shard} must be a multiple of --num-nodes {self.num_nodes}")
        if self.num_nodes > 1 and not _is_host_and_port(self.rendezvous):
            raise ValueError("--num-nodes above 1 needs --rendezvous HOST:PORT, an address of machine 0")
        return self


class UpSettings(GatewaySettings, WorkerSettings):
    """Options of `inferfleet up`: those of gateway and worker, and how many of each."""

    workers: Annotated[int, Field(ge=0, le=64)] = option(1, "worker processes; GPUs are dealt out among several")
    gateways: Annotated[int, Field(ge=1, le=64)] = option(1, "gateway processes, on ports counted up from --port")
    fresh: bool = option(False, "drop the jobs of the last run")
    redis_maxmemory: str = option("", "memory limit of the embedded Redis, such as 2gb")

    @model_validator(mode="after")
    def _check_worker_of_nodes(self) -> Self:
        if self.node_rank:
            raise ValueError("a machine with a --node-rank above 0 runs `inferfleet worker`, not `up`")
        if self.num_nodes > 1 and self.workers > 1:
            raise ValueError(f"--workers {self.workers} would meet at one --rendezvous; one of them can")
        return self


class PrepareSettings(_Settings):
    """Fetch a model, convert pickled weights to safetensors and make tokenizer.json, as far as the model needs it; or
    write it again with its weights in few bits."""

    model: CliPositionalArg[str] = Field(description="local folder or hub id")
    revision: str | None = option(None, "branch, tag or commit of a hub id", "revision")
    output: str | None = option(
        None, "folder to write to; none: a local model's own, or one with the name of a hub's model"
    )
    huggingface_hub_cache: str | None = option(None, "folder for downloads from the hub", "huggingface_hub_cache")
    quantize: Literal["gptq", "int8", "int4"] | None = option(
        None, "write the weights in few bits to --output: by GPTQ, or rounded to the nearest of 8 or 4 bits"
    )
    bits: int = option(4, "bits of a weight by GPTQ: 2, 4 or 8")
    group_size: int = option(128, "neighbours in a row that share a scale: 32, 64, 128, 256, or -1 for the whole row")
    desc_act: bool = option(False, "GPTQ takes the columns that matter most first; slower to serve for some")
    calibration: str | None = option(None, "file of UTF-8 text, such as the model is for, by which GPTQ rounds")
    calibration_tokens: Annotated[int, Field(ge=512, le=1 << 24)] = option(65_536, "tokens of it that GPTQ takes")

    @field_validator("bits", "group_size")
    @classmethod
    def _is_possible(cls, value: int, info: Any) -> int:
        allowed = POSSIBLE_NUMBERS[info.field_name]
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(str, allowed))}, not {value}")
        return value

    @model_validator(mode="after")
    def _check_quantisation(self) -> Self:
        for name, methods in USERS_OF_OPTIONS.items():
            if name in self.model_fields_set and self.quantize not in methods:
                flag, users = f"--{name.replace('_', '-')}", " or ".join(f"--quantize {method}" for method in methods)
                raise ValueError(f"{flag} is for {users}")
        if self.quantize and not self.output:
            raise ValueError("--quantize needs --output: a quantised model is never written over the whole one")
        if self.quantize == "gptq" and not self.calibration:
            raise ValueError("--quantize gptq needs --calibration: a file of text such as the model is for")
        return self


class BenchSettings(_Settings):
    """Throughput and latency of a server with OpenAI's or TGI's routes, or with --offline of an engine in this process.
    The engine's own options, those of `inferfleet worker`, follow a --."""

    url: str = option("http://localhost:8080", "base URL of the server")
    api: Literal["completions", "chat", "generate_stream"] = option(
        "completions", "route: /v1/completions, /v1/chat/completions or TGI's /generate_stream"
    )
    offline: bool = option(False, "no server: an engine in this process")
    model: str = option("", "model to name; none: the first that the server lists")
    api_key: SecretStr | None = option(None, "sent as a bearer token")
    clients: Counts = option(
        [8], "closed loop: so many clients, each with one request at a time; 1,8,32 are three runs"
    )
    rate: Rates = option([], "open loop: requests per second at random moments (Poisson); 2,4,8 are three runs")
    num_requests: Annotated[int, Field(gt=0, le=10_000_000)] | None = option(None, "requests of a run")
    duration: Annotated[float, Field(gt=0, le=604_800)] | None = option(
        None, "seconds after which a run sends nothing more; without it and --num-requests: 30"
    )
    warmup: Annotated[int, Field(ge=0, le=100_000)] | None = option(
        None, "requests before each run that do not count; none: one for each client, or a second's worth"
    )
    input_tokens: TokenRange = option("128", "length of prompts; 16-512: evenly between these")
    output_tokens: TokenRange = option("128", "length of answers, likewise")
    prefix_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = option(
        0, "tokens before those of --input-tokens that are the same in all prompts of a run"
    )
    dataset: str | None = option(
        None, "file of prompts, a JSON value a line: a text, or an object with prompt, inputs, text or messages"
    )
    tokenizer: str | None = option(
        None, "the model's tokenizer.json or its folder, for prompts of words that have exactly these lengths"
    )
    ignore_eos: bool = option(True, "ask for answers of full length, where the server can")
    body: str = option("", "JSON object with further fields of every request; TGI: further parameters")
    seed: int | None = option(
        None, "what decides prompts, lengths and moments; none: drawn, so that no cache knows the prompts"
    )
    timeout: PositiveFloat = option(600.0, "seconds after which a request has failed")
    results: str | None = option(None, "file for all figures as JSON")
    plot: str | None = option(None, "file for a plot, SVG")

    @property
    def input_range(self) -> range:
        return read_token_range(self.input_tokens)

    @property
    def output_range(self) -> range:
        return read_token_range(self.output_tokens)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        given = self.model_fields_set
        if "rate" in given and "clients" in given:
            raise ValueError("--clients is a closed loop and --rate an open one; give one of them")
        for name in ("input_tokens", "prefix_tokens", "tokenizer"):
            if self.dataset is not None and name in given:
                raise ValueError(f"--{name.replace('_', '-')} is for prompts that are made up; --dataset has its own")
        return self


class _OneLineParser(argparse.ArgumentParser):
    """Errors become ConfigurationError, with the closest name for an unknown option."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized") and unknown[0].startswith("-"):
            name = unknown[0].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(name, known + [f"--{key}" for key in WITHOUT_MEANING], n=1)
            raise ConfigurationError(f"unknown option {name}" + (f"; did you mean {close[0]}?" if close else ""))
        raise ConfigurationError(message)


def drop_without_meaning(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split command-line arguments into those that count and warnings for TGI's options that change nothing."""
    kept: list[str] = []
    warnings: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in WITHOUT_MEANING:
            kept.append(argument)
            continue
        num_values, reason = WITHOUT_MEANING[name]
        warnings.append(f"--{name} changes nothing: {reason}")
        if num_values and not value:
            next(rest, None)
    return kept, warnings


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    # what is wrong with several options together names them itself
    return f"--{str(first['loc'][0]).replace('_', '-')}: {message}" if first["loc"] else message


def parse(settings_class: type[SettingsType], arguments: list[str], *, program: str = "inferfleet") -> SettingsType:
    """Read flags and environment. Warnings for options without meaning go to standard error.

    Raises:
        ConfigurationError: one line that says which option is wrong and what is allowed.
    """
    kept, warnings = drop_without_meaning(arguments)
    for line in warnings:
        sys.stderr.write(f"warning: {line}\n")
    parser = _OneLineParser(prog=program, description=settings_class.__doc__, allow_abbrev=False)
    source: CliSettingsSource[Any] = CliSettingsSource(settings_class, root_parser=parser)
    try:
        return CliApp.run(settings_class, cli_args=kept, cli_settings_source=source)
    except ValidationError as error:
        raise ConfigurationError(_one_line(error)) from None


def environment_name(settings_class: type[BaseSettings], name: str) -> str:
    """The environment variable that sets option `name`."""
    alias = settings_class.model_fields[name].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0]).upper()
    return f"INFERFLEET_{name}".upper()


def environment_of(settings: BaseSettings, settings_class: type[BaseSettings]) -> dict[str, str]:
    """What a child process of `settings_class` needs in its environment to see the options given here."""
    names = settings.model_fields_set & set(settings_class.model_fields)
    values = {name: getattr(settings, name) for name in sorted(names)}
    return {environment_name(settings_class, name): _text(value) for name, value in values.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
