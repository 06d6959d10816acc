"""Options: flags, environment, TGI's names and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.settings import (
    WITHOUT_MEANING,
    GatewaySettings,
    PrepareSettings,
    UpSettings,
    WorkerSettings,
    environment_of,
    parse,
)

TGI_LAUNCHER_OPTIONS = """
model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens max-input-tokens
max-input-length max-total-tokens waiting-served-ratio max-batch-prefill-tokens max-batch-total-tokens
max-waiting-tokens max-batch-size cuda-graphs hostname port prometheus-port shard-uds-path master-addr
master-port huggingface-hub-cache weights-cache-override disable-custom-kernels cuda-memory-fraction
rope-scaling rope-factor json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma
watermark-delta ngrok ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support
max-client-batch-size lora-adapters usage-stats payload-limit enable-prefill-logprobs
graceful-termination-timeout
""".split()


TWO_NODES = ["--num-nodes", "2", "--num-shard", "4", "--rendezvous", "[::1]:5000"]
SCHEMES = (
    "'none', 'int8', 'int4', 'fp8', 'bitsandbytes', 'bitsandbytes-nf4', 'bitsandbytes-fp4', 'gptq', 'awq' or "
    "'compressed-tensors'"
)
FORMS = "name=folder nor owner/name[@revision] of a hub"
NAMES = "an adapter's name is 1 to 96 of [A-Za-z0-9._-], in parts divided by /"
NO_ADDRESS = "--num-nodes above 1 needs --rendezvous HOST:PORT, an address of machine 0"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PORT", "HOSTNAME", "MODEL_ID", "REDIS_URL", "API_KEY", "LOG_LEVEL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("common.settings.GPUS", tmp_path / "no-gpus")


def known_flags(settings_class: type[UpSettings]) -> set[str]:
    flags = set(WITHOUT_MEANING)
    for name, field in settings_class.model_fields.items():
        alias = field.validation_alias
        names = [name] if alias is None else [str(choice) for choice in alias.choices]  # type: ignore[union-attr]
        flags |= {choice.replace("_", "-") for choice in names}
    return flags


@pytest.mark.parametrize("flag", TGI_LAUNCHER_OPTIONS)
def test_every_launcher_option_of_tgi_is_known(flag: str) -> None:
    assert flag in known_flags(UpSettings)


def test_flag_wins_over_environment_and_environment_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(GatewaySettings, []).port == 8080
    monkeypatch.setenv("PORT", "9000")
    assert parse(GatewaySettings, []).port == 9000
    assert parse(GatewaySettings, ["--port", "9001"]).port == 9001
    assert parse(GatewaySettings, ["-p", "9002"]).port == 9002


def test_own_options_need_their_prefix_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASE", "1")
    assert parse(GatewaySettings, []).lease == 6.0
    monkeypatch.setenv("INFERFLEET_LEASE", "1")
    assert parse(GatewaySettings, []).lease == 1.0


@pytest.mark.parametrize(
    ("value", "expected"), [("3f2a9c", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("localhost", "localhost")]
)
def test_hostname_of_the_machine_is_not_an_address(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("HOSTNAME", value)
    assert parse(GatewaySettings, []).hostname == expected


def test_names_of_vllm_are_aliases() -> None:
    settings = parse(
        UpSettings, ["--model", "m", "--max-model-len", "64", "--served-model-name", "a,b", "--host", "::1"]
    )
    assert (settings.model_id, settings.max_total_tokens, settings.hostname) == ("m", 64, "::1")
    assert settings.served_model_name == ["a", "b"]


def test_sizes_of_graphs_reach_the_worker_of_up_and_none_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(UpSettings, ["--cuda-graphs", "1,2,8", "--gpu-memory-utilization", "0.8", "--no-overlap"])
    environment = environment_of(settings, WorkerSettings)
    assert environment == {
        "CUDA_GRAPHS": "1,2,8",
        "CUDA_MEMORY_FRACTION": "0.8",
        "INFERFLEET_OVERLAP": "false",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    worker = parse(WorkerSettings, [])
    assert (worker.cuda_graphs, worker.cuda_memory_fraction, worker.overlap) == ([1, 2, 8], 0.8, False)
    assert parse(WorkerSettings, ["--cuda-graphs", "0"]).cuda_graphs == [0]


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e4m3fn"])
def test_names_of_one_kv_type_are_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(WorkerSettings, ["--kv-cache-dtype", name]).kv_cache_dtype == "fp8_e4m3fn"
    monkeypatch.setenv("KV_CACHE_DTYPE", name)
    assert environment_of(parse(UpSettings, []), WorkerSettings) == {"KV_CACHE_DTYPE": "fp8_e4m3fn"}


def test_options_without_meaning_warn_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    settings = parse(UpSettings, ["--watermark-gamma", "0.5", "--ngrok", "--max-batch-size=4", "--port", "81"])
    assert settings.port == 81
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert all("changes nothing: " in line for line in warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "80"], "unknown option --prot; did you mean --port?"),
        (["--max-total-token=5"], "unknown option --max-total-token; did you mean --max-total-tokens?"),
        (["--port", "http"], "--port: Input should be a valid integer, unable to parse string as an integer"),
        (["--port", "70000"], "--port: Input should be less than or equal to 65535"),
        (["--dtype", "int3"], "--dtype: Input should be 'auto', 'float16', 'bfloat16', 'float32' or 'float64'"),
        (["--max-input-tokens", "0"], "--max-input-tokens: Input should be greater than 0"),
        (["--num-shard", "0"], "--num-shard: Input should be greater than or equal to 1"),
        (["--sharded", "perhaps"], "--sharded: Input should be 'true' or 'false'"),
        (["--sharded", "true"], "--sharded true is one rank for each of 0 GPUs; give --num-shard"),
        (["--sharded", "true", "--num-shard", "1"], "--sharded true contradicts --num-shard 1; give only one"),
        (["--sharded", "false", "--num-shard", "2"], "--sharded false contradicts --num-shard 2; give only one"),
        (["--num-nodes", "2"], "--num-shard 1 must be a multiple of --num-nodes 2"),
        (["--node-rank", "1"], "--node-rank and --rendezvous are for several machines; give --num-nodes too"),
        (["--rendezvous", "a:1"], "--node-rank and --rendezvous are for several machines; give --num-nodes too"),
        ([*TWO_NODES, "--num-shard", "3"], "--num-shard 3 must be a multiple of --num-nodes 2"),
        ([*TWO_NODES, "--node-rank", "2"], "--node-rank 2 must be below --num-nodes 2"),
        ([*TWO_NODES, "--rendezvous", ""], NO_ADDRESS),
        ([*TWO_NODES, "--rendezvous", ":5000"], NO_ADDRESS),
        ([*TWO_NODES, "--rendezvous", "host:70000"], NO_ADDRESS),
        ([*TWO_NODES, "--node-rank", "1"], "a machine with a --node-rank above 0 runs `inferfleet worker`, not `up`"),
        ([*TWO_NODES, "--workers", "2"], "--workers 2 would meet at one --rendezvous; one of them can"),
        (["--device", "gpu"], "--device: Input should be 'auto', 'cuda' or 'cpu'"),
        (["--cuda-graphs", "0,4"], "--cuda-graphs: 0 is for none at all and cannot stand with others"),
        (["--cuda-graphs", "-1"], "--cuda-graphs: Input should be greater than or equal to 0"),
        (["--cuda-memory-fraction", "1.5"], "--cuda-memory-fraction: Input should be less than or equal to 1"),
        (["--gpu-memory-utilization", "0"], "--cuda-memory-fraction: Input should be greater than 0"),
        (["--quantize", "exl2"], f"--quantize: Input should be {SCHEMES}"),
        (
            ["--kv-cache-dtype", "fp16"],
            "--kv-cache-dtype: Input should be 'auto', 'int8', 'fp8_e4m3fn' or 'fp8_e5m2'",
        ),
        (["--lora-adapters", "a=b,a=c"], "--lora-adapters: 'a' is given twice"),
        (["--lora-adapters", "./fr"], f"--lora-adapters: './fr' is neither {FORMS}"),
        (["--lora-adapters", "é=./fr"], f"--lora-adapters: {NAMES}"),
        (["--max-loras", "0"], "--max-loras: Input should be greater than 0"),
        (["--speculate", "-1"], "--speculate: Input should be greater than or equal to 0"),
        (["--speculate", "65"], "--speculate: Input should be less than or equal to 64"),
        (["--enable-prefill-logprobs"], "--enable-prefill-logprobs: is not available in this version"),
        (["--rope-scaling", "yarn"], "--rope-scaling: Input should be 'linear' or 'dynamic'"),
        (["--rope-factor", "0.5"], "--rope-factor: Input should be greater than or equal to 1"),
        (["--workers", "-1"], "--workers: Input should be greater than or equal to 0"),
        (["--log-level", "loud"], "--log-level: Input should be 'debug', 'info', 'warning' or 'error'"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(UpSettings, arguments)
    assert str(caught.value) == message


def test_adapters_have_names_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse(UpSettings, ["--lora-adapters", "fr=/adapters/fr, org/sql@v2"])
    assert settings.adapter_sources == {"fr": "/adapters/fr", "org/sql": "org/sql@v2"}
    for name, value in environment_of(settings, WorkerSettings).items():
        monkeypatch.setenv(name, value)
    assert parse(WorkerSettings, []).adapter_sources == settings.adapter_sources


GROUPS_ARE_FOR = "--group-size is for --quantize gptq or --quantize int4"
GPTQ = ["--quantize", "gptq", "--output", "new"]
TO_OUTPUT = "--quantize needs --output: a quantised model is never written over the whole one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "awq"], "--quantize: Input should be 'gptq', 'int8' or 'int4'"),
        (["--quantize", "int8"], TO_OUTPUT),
        (["--quantize", "int8", "--output", ""], TO_OUTPUT),
        (GPTQ, "--quantize gptq needs --calibration: a file of text such as the model is for"),
        ([*GPTQ, "--bits", "3"], "--bits: must be one of 2, 4, 8, not 3"),
        ([*GPTQ, "--group-size", "100"], "--group-size: must be one of -1, 32, 64, 128, 256, not 100"),
        ([*GPTQ, "--calibration-tokens", "511"], "--calibration-tokens: Input should be greater than or equal to 512"),
        (
            [*GPTQ, "--calibration-tokens", "16777217"],
            "--calibration-tokens: Input should be less than or equal to 16777216",
        ),
        (["--bits", "4"], "--bits is for --quantize gptq"),
        (["--quantize", "int8", "--output", "new", "--group-size", "64"], GROUPS_ARE_FOR),
        (["--quantize", "int4", "--output", "new", "--desc-act"], "--desc-act is for --quantize gptq"),
        (["--calibration", "text"], "--calibration is for --quantize gptq"),
        (["--calibration-tokens", "600"], "--calibration-tokens is for --quantize gptq"),
    ],
)
def test_bad_options_of_prepare_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(PrepareSettings, ["model", *arguments])
    assert str(caught.value) == message


def test_prepare_knows_what_was_asked_for() -> None:
    assert parse(PrepareSettings, ["model"]).quantize is None
    settings = parse(PrepareSettings, ["model", *GPTQ, "--calibration", "text", "--desc-act", "--group-size", "-1"])
    assert (settings.bits, settings.group_size, settings.desc_act) == (4, -1, True)
    assert parse(PrepareSettings, ["model", "--quantize", "int4", "--output", "new"]).group_size == 128


def test_secrets_do_not_show() -> None:
    settings = parse(UpSettings, ["--api-key", "hunter2", "--redis-url", "redis://:hunter2@localhost"])
    assert "hunter2" not in repr(settings) + str(settings.model_dump())


def test_children_see_what_was_given_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "--api-key",
        "k",
        "--port",
        "9000",
        "--no-prefix-caching",
        "--served-model-name",
        "a,b",
        "--lease",
        "2",
    ]
    settings = parse(UpSettings, arguments)
    gateway = environment_of(settings, GatewaySettings)
    worker = environment_of(settings, WorkerSettings)
    assert gateway == {"API_KEY": "k", "PORT": "9000", "INFERFLEET_LEASE": "2.0"}
    assert worker == {"PREFIX_CACHING": "false", "SERVED_MODEL_NAME": "a,b", "INFERFLEET_LEASE": "2.0"}
    for name, value in worker.items():
        monkeypatch.setenv(name, value)
    again = parse(WorkerSettings, [])
    assert (again.prefix_caching, again.served_model_name, again.lease) == (False, ["a", "b"], 2.0)


def test_tgis_switch_takes_a_rank_for_each_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("common.settings.GPUS", tmp_path)
    assert parse(WorkerSettings, []).num_shard == 1
    assert parse(WorkerSettings, ["--sharded", "true"]).num_shard == 3
    assert parse(WorkerSettings, ["--sharded", "true", "--num-shard", "2"]).num_shard == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    settings = parse(UpSettings, ["--sharded", "true"])
    assert settings.num_shard == 2
    assert environment_of(settings, WorkerSettings) == {"NUM_SHARD": "2", "SHARDED": "true"}


def test_ranks_are_spread_over_nodes_in_their_order() -> None:
    assert parse(WorkerSettings, ["--tensor-parallel-size", "3"]).local_ranks == range(3)
    first, second = (parse(WorkerSettings, [*TWO_NODES, "--node-rank", rank]) for rank in "01")
    assert (first.local_ranks, second.local_ranks) == (range(2), range(2, 4))
    assert second.ranks_per_node == 2
