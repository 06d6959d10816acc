"""An engine without a model: token = f(seed, position), behind the same pipe as the real one.

Run as `python -m tests.support.fake_engine --fd N --settings JSON [--step-ms 5] ...`. A prompt may carry orders:
`!exit@5` kills the process when it should give token 5, `!hang@5` stops it there for ever, `!eos@5` ends with EOS as
token 5, `!slow@20` makes each step last 20 ms while the request runs. `oracle` tells what a job must give.

An adapter is a folder with an `adapter_config.json`, whose bytes are its digest. It may order what happens when it is
looked at: `misfit` is the sentence why it does not fit, `exits` how many processes it kills. `adapted` tells what seed
its jobs get.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from tests.support.tiny_model import byte_characters
from worker.pipe import (
    HEADER,
    Abort,
    AdapterChecked,
    CheckAdapter,
    Commit,
    Failed,
    Message,
    Progress,
    Ready,
    Step,
    Stop,
    Submit,
    TokenRun,
    decode,
    encode,
)
from worker.process import die_with_parent

SENTENCES = (
    "A step at a time. Seven is a prime. ",
    "日本語で数えます。",
    "Tokens flow on. ",
    "一、二、三、四、五。",
    "Xin chào các bạn! ",
    "深度学习很有趣。",
    "It goes on: stop? no. ",
    "東京は晴れです。",
)
SLOT = 24
CONFIG = "adapter_config.json"
EXIT_STATUS = 70
ORDER = re.compile(r"!(exit|hang|eos|slow)@(\d+)")
MAX_UNCOMMITTED_STEPS = 64
MAX_UNCOMMITTED_S = 2.0


def _mix(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}.{number}".encode(), digest_size=8).digest(), "little")


def oracle_byte(seed: int, position: int) -> int:
    """Byte `position` of the endless text of `seed`: runs of 24 bytes out of one sentence, then out of another."""
    slot, offset = divmod(position, SLOT)
    text = SENTENCES[_mix(seed, slot) % len(SENTENCES)].encode()
    padded = text[: _whole_characters(text)].ljust(SLOT)
    return padded[offset]


def _whole_characters(text: bytes) -> int:
    """Length of the longest start of `text` within one slot that does not cut a character."""
    end = min(SLOT, len(text))
    while end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


class Vocabulary:
    """Ids of the 256 byte tokens of a byte-level tokenizer."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        self.byte_ids = [self.tokenizer.token_to_id(character) for character in byte_characters()]
        if None in self.byte_ids:
            raise ValueError("the tokenizer lacks byte tokens")

    def token(self, seed: int, position: int) -> int:
        token_id = self.byte_ids[oracle_byte(seed, position)]
        assert token_id is not None
        return token_id

    def orders(self, prompt_ids: list[int]) -> dict[str, int]:
        text = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        return {name: int(number) for name, number in ORDER.findall(text)}


@dataclass(frozen=True)
class Answer:
    """What an undisturbed run gives."""

    ids: list[int]
    text: str
    finish: str


def oracle(vocabulary: Vocabulary, seed: int, num_tokens: int, *, eos: tuple[int, int] | None = None) -> Answer:
    """The tokens and the text of a job without stop strings; `eos` = (position, id) for a prompt with that order."""
    ids = [vocabulary.token(seed, position) for position in range(num_tokens)]
    finish = "length"
    if eos is not None and eos[0] < num_tokens:
        ids = [*ids[: eos[0]], eos[1]]
        finish = "length" if len(ids) == num_tokens else "eos_token"
    return Answer(ids, vocabulary.tokenizer.decode(ids, skip_special_tokens=False), finish)


def logprob_of(seed: int, position: int) -> float:
    return -(1 + _mix(seed, position) % 1024 / 1024)


def write_adapter(folder: Path, rank: int = 8, **orders: object) -> str:
    """An adapter of this engine; its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"r": rank} | orders))
    return digest_of(folder)


def digest_of(folder: Path) -> str:
    return hashlib.blake2b((folder / CONFIG).read_bytes(), digest_size=16).hexdigest()


def adapted(seed: int, digest: str) -> int:
    """The seed whose tokens a job with this adapter gets."""
    return _mix(seed, int(digest[:8], 16)) % 2**32


@dataclass
class Running:
    submit: Submit
    orders: dict[str, int]
    num_output: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_output = len(self.submit.output_ids)

    @property
    def seed(self) -> int:
        adapter, seed = self.submit.adapter, self.submit.params.seed
        return seed if adapter is None else adapted(seed, adapter.digest)


class FakeEngine:
    """The state machine, without sockets: messages in, steps out."""

    def __init__(self, vocabulary: Vocabulary, *, max_num_seqs: int = 64, clock: Callable[[], float] = time.monotonic):
        self._vocabulary, self._max_num_seqs, self._clock = vocabulary, max_num_seqs, clock
        self._requests: dict[str, Running] = {}
        self._uncommitted: dict[int, float] = {}
        self._loaded: set[str] = set()
        self.answers: list[AdapterChecked] = []
        self.num_steps = self.num_tokens = self.batch_max = 0
        self._last_step = clock()

    def handle(self, message: Message) -> bool:
        """Apply a message of the agent; False when told to stop."""
        if isinstance(message, Submit):
            orders = self._vocabulary.orders(message.prompt_ids)
            self._requests[message.request_id] = Running(message, orders)
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                self._requests.pop(request_id, None)
        elif isinstance(message, CheckAdapter):
            self.answers.append(self._check(message))
        elif isinstance(message, Commit):
            self._uncommitted = {step: at for step, at in self._uncommitted.items() if step > message.step}
        return not isinstance(message, Stop)

    @staticmethod
    def _check(message: CheckAdapter) -> AdapterChecked:
        folder = Path(message.source)
        try:
            config, digest = json.loads((folder / CONFIG).read_bytes()), digest_of(folder)
        except FileNotFoundError:
            error = f"adapter {message.name}: there is no {CONFIG} in {folder}"
            return AdapterChecked(message.name, message.source, "", 0, error)
        marks = folder / "exits"
        if len(done := marks.read_text() if marks.exists() else "") < config.get("exits", 0):
            marks.write_text(done + "x")
            os._exit(EXIT_STATUS)
        return AdapterChecked(message.name, message.source, digest, config["r"], config.get("misfit", ""))

    def _problem(self, submit: Submit) -> str:
        """Why the request's adapter is not what it was when it was looked at, "" when it is."""
        adapter = submit.adapter
        if adapter is None or adapter.digest in self._loaded:
            return ""
        found = self._check(CheckAdapter(adapter.name, adapter.source))
        if found.error or found.digest != adapter.digest:
            return found.error or f"adapter {adapter.name}: {adapter.source} holds other weights now"
        self._loaded.add(adapter.digest)
        return ""

    @property
    def is_paused(self) -> bool:
        """Too much is not on Redis yet."""
        oldest = min(self._uncommitted.values(), default=self._clock())
        return len(self._uncommitted) >= MAX_UNCOMMITTED_STEPS or self._clock() - oldest > MAX_UNCOMMITTED_S

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def step_s(self) -> float:
        """How long the slowest running request makes a step, 0 when none asks for anything."""
        return max((r.orders.get("slow", 0) for r in self._batch()), default=0) / 1000

    def _batch(self) -> list[Running]:
        return list(self._requests.values())[: self._max_num_seqs]

    def step(self) -> Step:
        batch, now = self._batch(), self._clock()
        self.step_ms, self._last_step = 1000 * (now - self._last_step), now
        self.num_steps += 1
        self.batch_max = max(self.batch_max, len(batch))
        runs = [self._advance(running) for running in batch]
        self.num_tokens += len(runs)
        if runs:
            self._uncommitted[self.num_steps] = self._clock()
        return Step(step=self.num_steps, runs=runs, stats=self._stats(len(batch)))

    def _advance(self, running: Running) -> TokenRun:
        submit, position = running.submit, running.num_output
        if problem := self._problem(submit):
            del self._requests[submit.request_id]
            ended = TokenRun(request_id=submit.request_id, epoch=submit.epoch, ids=[], logprobs=[], finish="error")
            ended.error = problem
            return ended
        self._obey(running.orders, position)
        is_eos = running.orders.get("eos") == position and not submit.params.ignore_eos
        is_eos = is_eos and position >= submit.params.min_tokens
        token_id = submit.eos_token_ids[0] if is_eos else self._vocabulary.token(running.seed, position)
        logprob = logprob_of(running.seed, position)
        running.num_output += 1
        tops = [(token_id + index, logprob - index) for index in range(submit.params.num_top_logprobs)]
        finish = "length" if running.num_output >= submit.params.max_new_tokens else "eos_token" if is_eos else ""
        if finish:
            del self._requests[submit.request_id]
        return TokenRun(
            request_id=submit.request_id,
            epoch=submit.epoch,
            ids=[token_id],
            logprobs=[logprob],
            top_tokens=[tops] if tops else [],
            finish=finish,
        )

    @staticmethod
    def _obey(orders: dict[str, int], position: int) -> None:
        if orders.get("exit") == position:
            os._exit(EXIT_STATUS)
        while orders.get("hang") == position:
            time.sleep(60)

    def _stats(self, num_running: int) -> dict[str, float]:
        used = sum(len(r.submit.prompt_ids) + r.num_output for r in self._requests.values()) // 16
        return {
            "steps": self.num_steps,
            "decode_tokens": self.num_tokens,
            "batch_max": self.batch_max,
            "running": num_running,
            "waiting": max(0, len(self._requests) - self._max_num_seqs),
            "blocks_free": max(0, 4096 - used),
            "blocks_total": 4096,
            "step_ms": self.step_ms,
        }


class Pipe:
    """The engine's end of the socket, blocking."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._buffer = b""

    def send(self, message: Message) -> None:
        self._socket.sendall(encode(message))

    def receive(self, wait_s: float | None) -> Message | None:
        """The next message within `wait_s` (None: for ever).

        Raises:
            EOFError: if the agent is gone.
        """
        while (message := self._next()) is None:
            if not select.select([self._socket], [], [], wait_s)[0]:
                return None
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        return message

    def _next(self) -> Message | None:
        if len(self._buffer) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        body, self._buffer = self._buffer[HEADER.size : end], self._buffer[end:]
        return decode(body)


def serve(pipe: Pipe, engine: FakeEngine, step_s: float) -> None:
    """Step while there is work and enough of it is committed; take messages in between."""
    while True:
        while engine.answers:
            pipe.send(engine.answers.pop(0))
        if not engine.has_work or engine.is_paused:
            message = pipe.receive(0.05 if engine.has_work else None)
        else:
            pipe.send(engine.step())
            time.sleep(max(engine.step_s, step_s))
            message = pipe.receive(0)
        while message is not None:
            if not engine.handle(message):
                return
            message = pipe.receive(0)


def ready(
    settings: dict[str, object], vocabulary: Vocabulary, max_num_seqs: int, decoder_start_id: int | None = None
) -> Ready:
    return Ready(
        vocab_size=vocabulary.tokenizer.get_vocab_size(),
        dtype="float32",
        quantize="none",
        weights_digest="fake",
        kv_tokens=65536,
        block_size=16,
        max_num_seqs=max_num_seqs,
        max_input_tokens=4095,
        max_total_tokens=4096,
        max_batch_prefill_tokens=4096,
        step_limit_s=float(str(settings.get("step_limit", 60.0))),
        reasons=["a fake engine has no limits of its own"],
        decoder_start_id=decoder_start_id,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--settings", required=True)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--load-s", type=float, default=0.0, help="seconds between the first progress and the next")
    parser.add_argument("--fail", default="", help="say Failed with this sentence instead of Ready")
    parser.add_argument("--decoder-start-id", type=int, help="be an encoder-decoder model")
    options = parser.parse_args(arguments)
    settings = json.loads(options.settings)
    die_with_parent()
    pipe = Pipe(options.fd)
    pipe.send(Progress("weights", 1, 2))
    time.sleep(options.load_s)
    if options.fail:
        pipe.send(Failed(options.fail))
        return 1
    vocabulary = Vocabulary((Path(settings["model_id"]) / "tokenizer.json").read_bytes())
    pipe.send(ready(settings, vocabulary, options.max_num_seqs, options.decoder_start_id))
    try:
        serve(pipe, FakeEngine(vocabulary, max_num_seqs=options.max_num_seqs), options.step_ms / 1000)
    except (EOFError, ConnectionError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
