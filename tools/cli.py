"""The command line: ``weightcache COMMAND``. Each command asks the daemon or, without one, works on the store itself.

What a command needs beyond the standard library and typer is imported when it runs: ``--help`` is to be quick.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from weightcache.client import Client
from weightcache.config import Config
from weightcache.core.source import is_source
from weightcache.errors import BlobCorrupt, ConfigError, StoreError, WeightcacheError, from_wire
from weightcache.tools import exits, running, show, streams
from weightcache.tools.coldstart import coldstart
from weightcache.tools.fleet_command import simulate
from weightcache.tools.options import command, parse_size
from weightcache.version import __version__

if TYPE_CHECKING:
    from weightcache.node.node import Node

Json = dict[str, Any]

_ALLOW = "of a directory only files like this, * crossing /; may be repeated"
_IGNORE = "but no files like this; may be repeated"
AT_ONCE = 4  # sources that one pull loads together

_EPILOG = f"""\
\b
Exit codes:
{exits.summary()}

An error is one line on stderr or, with --json, an object {{"error": CLASS, "message": LINE}} on stdout.
Every setting is also a variable, WEIGHTCACHE_STORE for --store, and a key of the configuration file: see README.md.
"""

app = typer.Typer(
    help="Model weights from the fleet's caches first, and from object storage once.",
    epilog=_EPILOG,
    rich_markup_mode=None,  # importing rich takes longer than everything else here
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Sources = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="s3://, gs://, az://, hf://, https://, file://")
]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="a source that has been pulled")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="sources, or ids of blobs as ls shows them")]
SomeNames = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="sources, or ids of blobs; none: all")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"weightcache {__version__}")
        raise typer.Exit


@app.callback()
def _weightcache(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    pass


@command(app, "daemon", daemon=True)
def daemon(config: Config, as_json: bool) -> None:
    """Run this host's daemon, until SIGTERM or Ctrl-C.

    It prints one line on stdout when it answers; its log goes to stderr, as JSON unless that is a terminal.

    \b
    weightcache daemon --store /var/cache/weightcache --capacity 1TB
    weightcache daemon --listen 10.0.0.5:7700 --peer 10.0.0.6:7700 --cluster-key-file /etc/weightcache/key
    """
    from weightcache.daemon import main as run

    def ready(node: Node) -> None:
        facts = {"socket": str(config.socket_path), "listen": str(node.address), "pid": os.getpid()}
        line = show.as_line({"event": "ready"} | facts) if as_json else f"ready: {show.plain(_pairs(facts))}"
        print(line, flush=True)

    run(config, ready)


def _pairs(facts: Json) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


@command(app, "pull")
def pull(
    config: Config,
    as_json: bool,
    sources: Sources,
    revalidate: Annotated[bool, typer.Option("--revalidate", help="ask the origin for the current version")] = False,
    allow: Annotated[list[str] | None, typer.Option("--allow", metavar="GLOB", help=_ALLOW)] = None,
    ignore: Annotated[list[str] | None, typer.Option("--ignore", metavar="GLOB", help=_IGNORE)] = None,
    events: Annotated[bool, typer.Option("--events", help="with --json: also a line whenever chunks land")] = False,
) -> None:
    """Bring sources here, whole or in part.

    What was interrupted goes on where it stopped. All sources are tried; the exit code is the first failure's.

    --json prints one object a line, as each source ends: source, revision, path, bytes_total, bytes_here (on this
    disk before, if only in other files), bytes_nearby (in peers' other files), bytes_by_source (local; peer, by
    address; origin), seconds, stages, transfer, fallbacks. Of a source that failed: source, error, message.

    \b
    weightcache pull hf://org/name@main
    weightcache pull s3://models/sdxl/ s3://loras/anime.safetensors
    weightcache pull hf://org/name --allow '*.json' --allow '*.safetensors' --ignore '*.fp16.*'
    """
    wanted = {"revalidate": revalidate, "allow": allow or None, "ignore": ignore or None}
    code = running.run(_pull(config, sources, wanted, as_json, events))
    if code:
        raise typer.Exit(code)


async def _pull(config: Config, sources: list[str], wanted: Json, as_json: bool, events: bool) -> int:
    from weightcache.tools.progress import pulling

    def tell(source: str, outcome: Json | WeightcacheError) -> None:
        if isinstance(outcome, WeightcacheError):
            exits.tell(outcome, as_json=as_json, source=source)
        else:
            print(show.as_line(outcome) if as_json else show.pulled(outcome), flush=True)

    gate = asyncio.Semaphore(AT_ONCE)
    with pulling() as bar:
        async with Client(config) as client:

            async def one(source: str) -> Json | WeightcacheError:
                hear = partial(_print_event, source) if as_json and events else bar(source)
                async with gate:
                    try:
                        outcome: Json | WeightcacheError = await client.pull(source, hear, **wanted)
                    except WeightcacheError as error:
                        outcome = error
                if as_json:  # as each ends; people see a bar meanwhile
                    tell(source, outcome)
                return outcome

            outcomes = await asyncio.gather(*(one(source) for source in sources))
    if not as_json:
        for source, outcome in zip(sources, outcomes, strict=True):
            tell(source, outcome)
    return next((outcome.exit_code for outcome in outcomes if isinstance(outcome, WeightcacheError)), 0)


def _print_event(source: str, event: Json) -> None:
    if event["event"] != "done":  # its report is printed in any case
        print(show.as_line({"source": source} | event), flush=True)


@command(app, "path")
def path(config: Config, as_json: bool, source: Source) -> None:
    """Print where a source lies on this disk.

    The path of its file or of its snapshot's directory, real and complete.

    \b
    weightcache pull hf://org/name && python serve.py "$(weightcache path hf://org/name)"
    """

    async def ask() -> Path:
        async with Client(config) as client:
            return await client.path(source)

    found = str(running.run(ask()))
    print(show.as_line({"path": found}) if as_json else found)


@command(app, "ls")
def ls(config: Config, as_json: bool) -> None:
    """List the snapshots and blobs of the store.

    \b
    weightcache ls
    weightcache ls --json | jq '.blobs[] | select(.pinned) | .name'
    """

    async def ask() -> Json:
        async with Client(config) as client:
            return await client.ls()

    found = running.run(ask())
    print(show.as_line(found) if as_json else show.listing(found))


@command(app, "status")
def status(config: Config, as_json: bool) -> None:
    """Show what the daemon has, moves and serves.

    Exits 10 if none runs.

    \b
    weightcache status --json | jq .bytes.free
    """

    async def ask() -> Json:
        async with Client(config, embed=False) as client:
            return await client.status()

    found = running.run(ask())
    print(show.as_line(found) if as_json else show.status(found))


@command(app, "peers")
def peers(config: Config, as_json: bool) -> None:
    """Show the daemon's peers.

    Who is connected, how fast they are, what came from them and went to them, and why some are not. Exits 10 if no
    daemon runs.

    \b
    weightcache peers
    """

    async def ask() -> list[Json]:
        async with Client(config, embed=False) as client:
            return await client.peers()

    found = running.run(ask())
    print(show.as_line(found) if as_json else show.peers(found))


@command(app, "pin")
def pin(config: Config, as_json: bool, names: Names) -> None:
    """Keep blobs, whatever else needs room.

    They stay until unpin, and must have been pulled.

    \b
    weightcache pin hf://org/name
    """
    _set_pin(config, as_json, names, on=True)


@command(app, "unpin")
def unpin(config: Config, as_json: bool, names: Names) -> None:
    """Let pinned blobs go again when room is needed.

    \b
    weightcache unpin hf://org/name 0a1b2c3d4e5f
    """
    _set_pin(config, as_json, names, on=False)


def _set_pin(config: Config, as_json: bool, names: list[str], *, on: bool) -> None:
    async def ask() -> list[Json]:
        async with Client(config) as client:
            return await (client.pin if on else client.unpin)(names)

    rows = running.run(ask())
    if as_json:
        print(show.as_line(rows))
        return
    shown = [(row["blob"][:12], show.human(row["size"]), "yes" if row["pinned"] else "no", row["path"]) for row in rows]
    print(show.columns(("BLOB", "SIZE", "PINNED", "FILE"), shown, "SIZE"))


@command(app, "evict")
def evict(
    config: Config,
    as_json: bool,
    names: SomeNames = None,
    need: Annotated[
        int | None, typer.Option("--need", parser=parse_size, metavar="SIZE", help="free so much, the oldest first")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="remove all that nobody holds")] = False,
) -> None:
    """Remove blobs, and say what stays.

    A blob stays that is pinned, leased, loading, or mapped by some process. Exits 8 if a blob that was named stays, or
    less than --need was freed.

    \b
    weightcache evict s3://models/old/
    weightcache evict --need 50GB
    weightcache evict --all
    """
    if bool(names) + (need is not None) + everything != 1:
        raise ConfigError("evict: give names, or --need SIZE, or --all")

    async def ask() -> Json:
        async with Client(config) as client:
            if not everything:
                return await client.evict(names, need or 0)
            blobs = [blob["blob"] for blob in (await client.ls())["blobs"]]
            return await client.evict(blobs) if blobs else {"freed": 0, "kept": []}

    outcome = running.run(ask())
    print(show.as_line(outcome) if as_json else show.evicted(outcome))
    short = outcome["freed"] < (need or 0)
    if short and not as_json:
        exits.say(
            "StoreError", f"evict: less than {show.human(need or 0)} may go; ls shows what is held", as_json=False
        )
    if short or (names and outcome["kept"]):
        raise typer.Exit(StoreError.exit_code)


@command(app, "verify")
def verify(
    config: Config,
    as_json: bool,
    names: SomeNames = None,
    deep: Annotated[bool, typer.Option("--deep", help="by BLAKE3 instead of xxh3: against forgery, too")] = False,
    no_repair: Annotated[bool, typer.Option("--no-repair", help="do not bring bad chunks again")] = False,
) -> None:
    """Read blobs again, and mend them.

    Chunks that are not as they were written are brought again, from peers or the origin. Exits 8 if any stays bad.

    \b
    weightcache verify
    weightcache verify --deep hf://org/name
    """
    from weightcache.tools.progress import verifying

    async def ask() -> list[Json]:
        with verifying() as hear:
            async with Client(config) as client:
                return await client.verify(names or None, hear, deep=deep, repair=not no_repair)

    rows = running.run(ask())
    print(show.as_line(rows) if as_json else show.verified(rows))
    if any(row["bad"] and (row["error"] or row["repaired"] is None) for row in rows):
        raise typer.Exit(BlobCorrupt.exit_code)


@command(app, "manifest")
def manifest(
    config: Config,
    as_json: bool,
    what: Annotated[str, typer.Argument(metavar="SOURCE-OR-FILE", help="a source, or a path on this disk")],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="another one, to compare with")] = None,
) -> None:
    """Show a file's chunks, or what it shares.

    Offset, length and id of each chunk; with OTHER, how much of the first is in the second, by chunk id. A local file
    is read and hashed here; of a source the daemon is asked, which may not know the ids of what nobody has read yet.

    \b
    weightcache manifest model.safetensors
    weightcache manifest s3://models/fine-tune.safetensors s3://models/base.safetensors
    """
    from weightcache.tools import chunks

    async def ask(source: str) -> list[Json]:
        async with Client(config) as client:
            return await client.manifest(source)

    def described(name: str) -> list[Json]:
        return running.run(ask(name)) if is_source(name) else [chunks.describe(Path(name))]

    ours = described(what)
    if other is None:
        print(show.as_line({"files": ours}) if as_json else show.manifests(ours))
        return
    common = chunks.shared(ours, described(other))
    print(show.as_line(common) if as_json else show.shared(what, other, common))


@command(app, "publish")
def publish(
    config: Config,
    as_json: bool,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="an object, a prefix, or a repository")],
    to: Annotated[str, typer.Option("--to", metavar="WHERE", help="beside, fleet, or a file or directory")] = "beside",
    force: Annotated[bool, typer.Option("--force", help="replace what is there and says otherwise")] = False,
) -> None:
    """Publish manifests, so that others fetch only what differs.

    A source that is not here is pulled first. What is published are the ids of its chunks: with them, the first host to
    load a fine-tune already takes what it shares with its base from its own disk or from peers. WHERE: beside the
    object (NAME.weightcache, with the daemon's credentials), into the fleet's directory (Redis), or a file.

    --json prints one object a line for each file of 1 MiB or more: path, source, version, size, bytes, to, state
    (published, replaced, same; error with error and message). The exit code is the first failure's.

    \b
    weightcache publish s3://models/fine-tune.safetensors
    weightcache publish hf://org/name --to fleet
    """
    code = running.run(_publish(config, source, to, force, as_json))
    if code:
        raise typer.Exit(code)


async def _publish(config: Config, source: str, to: str, force: bool, as_json: bool) -> int:
    from weightcache.tools import publish as publishing
    from weightcache.tools.progress import publishing as bars

    place, path = publishing.target(to)
    with bars(source) as hear:
        async with Client(config) as client:
            rows = await client.publish(source, hear, to=place, force=force)
    if path is not None:
        many = len(rows) > 1
        rows = [publishing.keep(row, path, many=many, force=force) if "data" in row else row for row in rows]
    failed = [row for row in rows if row["state"] == "error"]
    if as_json:
        for row in rows:
            print(show.as_line({key: value for key, value in row.items() if key != "event"}), flush=True)
    else:
        if len(failed) < len(rows):
            print(publishing.told([row for row in rows if row["state"] != "error"]))
        for row in failed:
            exits.say(row["error"], row["message"], as_json=False)
    return from_wire(failed[0]["error"], "").exit_code if failed else 0


command(app, "coldstart")(coldstart)
command(app, "simulate")(simulate)


@command(app, "run", rest=True)
def run_command(
    config: Config,
    as_json: bool,
    program: Annotated[list[str], typer.Argument(metavar="COMMAND [ARG]...", help="a program that loads models")],
    hub: Annotated[bool, typer.Option("--hub", help="ids of the hub, too, go through the cache")] = False,
) -> None:
    """Run a program whose libraries take sources.

    In it, and in what it starts, safetensors and the from_pretrained of diffusers, transformers and peft take s3://,
    gs://, hf:// ... where they take a path: weightcache.runtime.install, by the environment.

    \b
    weightcache run python serve.py --model s3://models/sdxl/
    weightcache run --hub python -c 'from transformers import AutoModel; AutoModel.from_pretrained("org/name")'
    """
    from weightcache.runtime.installing import environment

    where = {"WEIGHTCACHE_STORE": str(config.store), "WEIGHTCACHE_SOCKET": str(config.socket_path)}
    try:
        os.execvpe(program[0], program, os.environ | where | environment(hub=hub))
    except OSError as error:
        raise ConfigError(f"run: {program[0]}: {error.strerror}; give a program that is there") from None


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(exits.TERMINATED)


def _usage(error: Exception) -> str:
    """What typer has against the arguments, and where to read on."""
    context = getattr(error, "ctx", None)
    where = getattr(context, "command_path", "weightcache")
    return f"{error.format_message().rstrip('.')}; see: {where} --help"  # type: ignore[attr-defined]


def run(arguments: list[str]) -> int:
    """Run a command; the code to exit with. Whatever goes wrong is one line, never a traceback."""
    as_json = "--json" in arguments
    try:
        code = app(arguments or ["--help"], prog_name="weightcache", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return exits.INTERRUPTED
    except BrokenPipeError:
        return streams.give_up()
    except SystemExit as left:
        if left.code == 1:  # typer's own way with a broken pipe
            return streams.give_up()
        raise
    except Exception as error:  # noqa: BLE001 - a traceback is no answer
        if hasattr(error, "format_message"):  # the arguments are wrong; typer's name for that differs by version
            exits.say("UsageError", _usage(error), as_json=as_json)
            return exits.USAGE
        return exits.tell(error, as_json=as_json)


def main() -> NoReturn:
    """The console script."""
    streams.reopen()
    signal.signal(signal.SIGTERM, _terminated)
    code = run(sys.argv[1:])
    streams.settle()
    sys.exit(code)
