"""The adapters of this worker: where they lie, whether they fit the model, and the requests that wait for one.

Nothing is loaded here: the engine compares an adapter with its model and loads it when a request comes that has it.
What Redis should hear is kept for the agent to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.adapters import MAX_SOURCE
from common.background import end
from common.errors import ConfigurationError
from common.settings import WorkerSettings
from common.store.replies import AdapterEntry, AdapterFinding
from worker.hub import ADAPTER_FILES, HubModel, ProgressFunction, commit_of, fetch, in_the_log, local_folder
from worker.pipe import AdapterChecked, CheckAdapter, Message, Submit
from worker.search import Found, Search

MAX_DOWNLOADS = 4
MAX_FOLDERS = 4096
MAX_DEATHS = 2
"""Of the engine while it looks at an adapter; then the adapter is to blame."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter lies on this machine, and how any machine finds the very same one."""

    folder: Path
    source: str


@dataclass(frozen=True, slots=True)
class Brought:
    """An adapter that fits, to be put on Redis by this worker."""

    name: str
    source: str
    found: AdapterFinding


def local_place(source: str, on_progress: ProgressFunction) -> Place | None:
    """The place of a local folder, None when `source` can only be a hub id.

    Raises:
        ConfigurationError: there is no such folder, or none whose full name may stand in a job.
    """
    folder = local_folder(source, "its source")
    if folder is None:
        return None
    place = str(folder.absolute())
    if not place.isprintable() or len(place) > MAX_SOURCE:
        raise ConfigurationError(f"{source} is in {place[:MAX_SOURCE]!r}, which must be printable and shorter")
    return Place(folder.absolute(), place)


def hub_place(source: str, cache: str | None, on_progress: ProgressFunction) -> Place:
    """The place of a hub's adapter in the cache, where it is downloaded if need be.

    Raises:
        ConfigurationError: one sentence with the fix.
    """
    name, _, revision = source.partition("@")
    folder = fetch(HubModel(name, revision or None, cache), ADAPTER_FILES, in_the_log(on_progress))
    return Place(folder, f"{name}@{commit_of(folder)}")


class Places:
    """Searches for sources: each once at a time however many ask for it, and few downloads at once."""

    def __init__(self, cache: str | None) -> None:
        self._cache = cache
        self._slots = asyncio.Semaphore(MAX_DOWNLOADS)
        self._tasks: dict[str, asyncio.Task[Place]] = {}
        self._searches: list[Search[Any]] = []

    async def find(self, source: str) -> Place:
        """Raises ConfigurationError as `local_place` and `hub_place`."""
        task = self._tasks.get(source)
        if task is None:
            task = self._tasks[source] = asyncio.create_task(self._find(source))
            task.add_done_callback(lambda done: self._forget(source, done))
        return await asyncio.shield(task)

    async def _find(self, source: str) -> Place:
        try:
            place = await self._search(partial(local_place, source))
            if place is not None:
                return place
            async with self._slots:
                return await self._search(partial(hub_place, source, self._cache))
        except ConfigurationError:
            raise
        except Exception as error:
            # whatever disks and caches come up with, it must not end the worker, nor leave a job without an answer
            raise ConfigurationError(f"{source} cannot be read: {error}") from error

    async def _search(self, find: Callable[[ProgressFunction], Found]) -> Found:
        search = Search(find)
        self._searches = [*self.running, search]
        return await search.result()

    def _forget(self, source: str, task: asyncio.Task[Place]) -> None:
        del self._tasks[source]
        if not task.cancelled():
            # whoever asked may have gone
            task.exception()

    @property
    def running(self) -> list[Search[Any]]:
        return [search for search in self._searches if search.is_running]

    async def close(self) -> None:
        await end(*self._tasks.values())
        await asyncio.gather(*[search.close() for search in self.running])


@dataclass(slots=True)
class _Question:
    """Asked of the engine, and again of the next one when it dies."""

    message: CheckAdapter
    answer: asyncio.Future[AdapterChecked]
    num_deaths: int = 0


class Adapters:
    """`send` passes a message on to the engine, `fail` ends a job whose adapter cannot be had with a sentence, `wake`
    says that there is something in `unsaid`: registrations and what was found of them."""

    def __init__(
        self,
        settings: WorkerSettings,
        send: Callable[[Message], None],
        fail: Callable[[Submit, str], None],
        wake: Callable[[], None],
    ) -> None:
        self._sources = settings.adapter_sources
        self._send, self._fail, self._wake = send, fail, wake
        self._places = Places(settings.huggingface_hub_cache)
        self._own: dict[str, Place] = {}
        self._own_sources: dict[str, str] = {}
        self._own_brought: list[Brought] = []
        self._folders: dict[str, Path] = {}
        self._questions: dict[CheckAdapter, _Question] = {}
        self._looks: dict[str, asyncio.Task[AdapterFinding]] = {}
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self.brought: list[Brought] = []
        self.unsaid: dict[str, tuple[AdapterEntry, AdapterFinding]] = {}

    # --- of the command line ----------------------------------------------------------------------------------------

    async def find_own(self) -> None:
        """Look for what `--lora-adapters` names.

        Raises:
            ConfigurationError: one of them is not there.
        """
        for name, source in self._sources.items():
            try:
                self._own[name] = await self._places.find(source)
            except ConfigurationError as error:
                raise ConfigurationError(f"--lora-adapters: {name}: {error}") from error

    async def check_own(self, model_names: Collection[str]) -> None:
        """Have the engine look at what `find_own` found: `brought` are to be put on Redis then.

        Raises:
            ConfigurationError: one of them does not fit, or is called like the model.
        """
        for name, place in self._own.items():
            if name in model_names:
                raise ConfigurationError(
                    f"--lora-adapters: {name} is the model's own name; give the adapter another one"
                )
            found = await self._ask(name, place)
            if found.error:
                raise ConfigurationError(f"--lora-adapters: {found.error}")
            self._own_sources[found.digest] = found.place
            self._own_brought.append(Brought(name, self._sources[name], found))
        self.bring_own()

    def bring_own(self) -> None:
        """What is to be put on Redis of a lane that has nothing yet, or was forgotten because nobody served it."""
        self.brought = list(self._own_brought)

    # --- of the lane ------------------------------------------------------------------------------------------------

    def follow(self, entries: Iterable[AdapterEntry]) -> None:
        """Look at what Redis says is loading, each registration once, and remember what it says is ready."""
        entries = list(entries)
        self.brought = [Brought(one.name, one.source, one.found) for one in entries if one.state == "ready"]
        loading = {entry.token: entry for entry in entries if entry.state == "loading"}
        for token in self._looks.keys() - loading.keys():
            self._looks.pop(token).cancel()
        for token, entry in loading.items():
            look = self._looks.get(token)
            if look is None:
                self._looks[token] = look = asyncio.create_task(self._look(entry.name, entry.source))
                look.add_done_callback(partial(self._looked, entry))
            elif look.done():
                # said already, but Redis lost it
                self._looked(entry, look)

    def _looked(self, entry: AdapterEntry, look: asyncio.Task[AdapterFinding]) -> None:
        if not look.cancelled():
            self.unsaid[entry.token] = entry, look.result()
            self._wake()

    async def _look(self, name: str, source: str) -> AdapterFinding:
        try:
            return await self._ask(name, await self._places.find(source))
        except ConfigurationError as error:
            return AdapterFinding(error=f"adapter {name}: {error}")

    # --- engine -----------------------------------------------------------------------------------------------------

    async def _ask(self, name: str, place: Place) -> AdapterFinding:
        message = CheckAdapter(name, str(place.folder))
        question = self._questions.get(message)
        if question is None:
            future: asyncio.Future[AdapterChecked] = asyncio.get_running_loop().create_future()
            question = self._questions[message] = _Question(message, future)
            self._send(message)
        answer = await asyncio.shield(question.answer)
        if answer.error:
            return AdapterFinding(error=answer.error)
        self._remember(answer.digest, place.folder)
        return AdapterFinding(digest=answer.digest, rank=answer.rank, place=place.source)

    def on_checked(self, answer: AdapterChecked) -> None:
        question = self._questions.pop(CheckAdapter(answer.name, answer.source), None)
        if question is not None:
            question.answer.set_result(answer)

    def on_engine_ready(self) -> None:
        """A new engine knows of no question."""
        for message in self._questions:
            self._send(message)

    def on_engine_lost(self) -> None:
        for message, question in list(self._questions.items()):
            question.num_deaths += 1
            if question.num_deaths >= MAX_DEATHS:
                error = f"adapter {message.name}: the engine died {MAX_DEATHS} times while it looked at it"
                self.on_checked(AdapterChecked(message.name, message.source, "", 0, error))

    def _remember(self, digest: str, folder: Path) -> None:
        self._folders.pop(digest, None)
        self._folders[digest] = folder
        if len(self._folders) > MAX_FOLDERS:
            del self._folders[next(iter(self._folders))]

    # --- requests ---------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> Collection[str]:
        """Requests that the engine does not have yet, because their adapter is searched for."""
        return self._waiting.keys()

    def placed(self, submit: Submit) -> Submit | None:
        """The request with its adapter's folder; None when that is searched for first, and the request sent then."""
        if submit.adapter is None:
            return submit
        folder = self._folders.get(submit.adapter.digest)
        if folder is not None:
            return _with_source(submit, str(folder))
        self._waiting[submit.request_id] = asyncio.create_task(self._place(submit))
        return None

    async def _place(self, submit: Submit) -> None:
        assert submit.adapter is not None
        # what is on our command line may lie elsewhere than on the worker that registered it
        source = self._own_sources.get(submit.adapter.digest, submit.adapter.source)
        try:
            place = await self._places.find(source)
        except ConfigurationError as error:
            self._waiting.pop(submit.request_id)
            self._fail(submit, f"adapter {submit.adapter.name}: {error}")
            return
        self._waiting.pop(submit.request_id)
        self._remember(submit.adapter.digest, place.folder)
        self._send(submit)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Nobody wants these requests any more."""
        for request_id in request_ids:
            task = self._waiting.pop(request_id, None)
            if task is not None:
                task.cancel()

    def forget(self, digest: str) -> None:
        """A job with it failed: look for it anew, in case its folder is gone."""
        self._folders.pop(digest, None)

    # --- end --------------------------------------------------------------------------------------------------------

    @property
    def search(self) -> Search[Any] | None:
        """One of the searches that run now."""
        return next(iter(self._places.running), None)

    async def close(self) -> None:
        await end(*self._looks.values(), *self._waiting.values())
        await self._places.close()


def _with_source(submit: Submit, folder: str) -> Submit:
    assert submit.adapter is not None
    return replace(submit, adapter=replace(submit.adapter, source=folder))
