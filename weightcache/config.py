"""Every setting, and the one place that reads them.

Later wins: defaults, a TOML file, the environment, the command line. A key is spelled alike everywhere: ``streams`` in
the file's ``[origin]`` is ``WEIGHTCACHE_ORIGIN_STREAMS`` in the environment and ``origin.streams`` among overrides.
Each field below carries its reader and its documentation; nothing else lists the settings.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from weightcache.address import (
    REDIS,
    Address,
    parse_address,
    parse_host,
    parse_redis,
    parse_text,
    without_secrets,
)
from weightcache.errors import ConfigError

__all__ = [
    "Address",
    "Config",
    "OriginConfig",
    "Setting",
    "cluster_key",
    "load_config",
    "parse_address",
    "parse_discover",
    "settings",
]

MAX_SOCKET_PATH = 107  # bytes: what a sockaddr_un holds besides the closing zero
MIN_KEY, MAX_KEY = 16, 4096  # bytes of a cluster key
_PREFIX = "WEIGHTCACHE_"
_FILE_VARIABLE = "WEIGHTCACHE_CONFIG"
_NO_SETTINGS = {_FILE_VARIABLE, "WEIGHTCACHE_INSTALL"}  # that one is a worker's: weightcache.runtime.install
_DEFAULT_FILE = "~/.config/weightcache/config.toml"
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)")
_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PLACES = ("local", "origin", "remote")


# Readers: from what a file, a variable or an option holds to a setting's value. ValueError says what is expected.

Reader = Callable[[object], Any]


def parse_discover(value: object) -> tuple[str, str, int]:
    """``zeroconf``, ``static``, ``dns:NAME[:PORT]`` or a Redis URL as (kind, name, port); port 0: not given.

    Raises ValueError. For the rest of a Redis URL see ``parse_redis``.
    """
    kind, _, name = (text := parse_text(value)).partition(":")
    if text in ("zeroconf", "static"):
        return kind, "", 0
    if kind in REDIS:
        return "redis", *parse_redis(text).address
    if kind != "dns" or not name:
        raise ValueError("zeroconf, static, dns:NAME[:PORT] or redis://HOST[:PORT][/DATABASE] is expected")
    address = parse_address(name if ":" in name else f"{name}:0")
    return kind, address.host, address.port


def _reachable(value: object) -> str:
    host = parse_host(value)
    if Address(host, 0).is_wildcard:
        raise ValueError("a host name or an IP address that peers can connect to is expected")
    return host


def _address(value: object) -> str:
    return str(parse_address(value))


def _listen(value: object) -> str:
    address = parse_address(value)
    if address.port == 65535:
        raise ValueError("a port below 65535 is expected: bulk data has the next one")
    return str(address)


def _peer(value: object) -> str:
    address = parse_address(value)
    if not address.port or address.is_wildcard:
        raise ValueError("HOST:PORT of another daemon is expected")
    return str(address)


def _discover(value: object) -> str:
    kind, name, port = parse_discover(value)
    if kind == "redis":
        return parse_text(value)
    return kind if kind != "dns" else f"{kind}:{Address(name, port) if port else name}"


def _prefer(value: object) -> tuple[str, ...]:
    texts = _each(parse_text)(value)
    places = tuple(
        part.strip() for text in texts for part in text.split(",")
    )  # an option holds them all, or is repeated
    if places[:1] != ("local",) or "origin" not in places or len({*places} & {*_PLACES}) != len(places):
        raise ValueError("local first, then origin, and remote before or after it or not at all, are expected")
    return places


def _source_prefix(value: object) -> str:
    text = parse_text(value)
    if "://" not in text:
        raise ValueError("how sources begin is expected, such as s3://bucket/")
    return text


def _label(value: object) -> str:
    text = parse_text(value)
    if not _LABEL.fullmatch(text):
        raise ValueError("1 to 64 letters, digits, '.', '_' or '-' are expected")
    return text


def _path(value: object) -> Path:
    try:
        path = Path(value if isinstance(value, Path) else parse_text(value)).expanduser().absolute()
    except RuntimeError as error:  # no such user, or no home
        raise ValueError(str(error)) from None
    if "\0" in str(path):
        raise ValueError("a path is expected")
    return path


def _size(value: object) -> int:
    match = _SIZE.fullmatch(str(value).strip()) if isinstance(value, str | int) else None
    unit = _UNITS.get(match[2].upper(), 0) if match else 0
    whole = match is not None and "." not in match[1]
    size = int((int(match[1]) if whole else float(match[1])) * unit) if match else 0
    if size <= 0:
        raise ValueError("bytes are expected, such as 200GB, 1.5TiB or 1000000")
    return size


def _seconds(least: float) -> Reader:
    def read(value: object) -> float:
        try:
            seconds = float(value) if type(value) in (str, int, float) else math.nan  # type: ignore[arg-type]
        except (ValueError, OverflowError):
            seconds = math.nan
        if not least <= seconds < math.inf:
            raise ValueError(f"seconds are expected, {least:g} or more")
        return seconds

    return read


def _count(most: int) -> Reader:
    def read(value: object) -> int:
        match = re.fullmatch(r"[0-9]{1,4}", str(value).strip()) if isinstance(value, str | int) else None
        if not match or not 1 <= int(match[0]) <= most:
            raise ValueError(f"a whole number from 1 to {most} is expected")
        return int(match[0])

    return read


def _switch(value: object) -> bool:
    found = _SWITCH.get(str(value).strip().lower()) if isinstance(value, str | int) else None
    if found is None:
        raise ValueError("true or false is expected")
    return found


def _optional(read: Reader) -> Reader:
    """Empty text takes back what an earlier place said."""
    return lambda value: None if value == "" else read(value)


def _each(read: Reader) -> Reader:
    def every(value: object) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise ValueError("a list is expected")
        return tuple(read(part) for part in value)

    return every


def _about(read: Reader, doc: str) -> dict[str, object]:
    return {"read": read, "doc": doc}


@dataclass(frozen=True, slots=True)
class OriginConfig:
    """How origins are reached. Credentials come from the environment that each client library documents."""

    allow: tuple[str, ...] = field(
        default=(),
        metadata=_about(_each(_source_prefix), "how the sources that may be read begin; empty: every remote scheme"),
    )
    file_roots: tuple[Path, ...] = field(
        default=(), metadata=_about(_each(_path), "directories that file:// sources may read from; empty: none")
    )
    streams: int = field(default=8, metadata=_about(_count(1024), "reads in flight to origins"))
    bandwidth: int | None = field(
        default=None, metadata=_about(_optional(_size), "bytes a second read from origins at most; default: no cap")
    )
    attempts: int = field(default=5, metadata=_about(_count(1024), "tries of one read before the load fails"))
    timeout: float = field(
        default=30.0, metadata=_about(_seconds(0.1), "seconds without a byte before a read is given up")
    )
    manifests: bool = field(
        default=True,
        metadata=_about(_switch, "true or false: look beside an object for the manifest that publish leaves there"),
    )


@dataclass(frozen=True, slots=True)
class Config:
    """One daemon's settings. Each value is checked when it is read; ``validate`` checks what they mean together."""

    store: Path = field(default=Path("~/.cache/weightcache"), metadata=_about(_path, "directory that holds the blobs"))
    socket: Path | None = field(
        default=None, metadata=_about(_optional(_path), "Unix socket of the daemon; default: daemon.sock in the store")
    )
    listen: str = field(
        default="127.0.0.1:0",
        metadata=_about(_listen, "HOST:PORT for peers: control; bulk data has the next port. 0: any two free ones"),
    )
    advertise: str | None = field(
        default=None,
        metadata=_about(_optional(_reachable), "host name or address that peers connect to; default: that of listen"),
    )
    peers: tuple[str, ...] = field(
        default=(), metadata=_about(_each(_peer), "HOST:PORT of the other daemons, for static discovery")
    )
    discover: str = field(
        default="static",
        repr=False,  # it may hold a password
        metadata=_about(
            _discover,
            "how peers are found: static, zeroconf, dns:NAME[:PORT] or redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE] "
            "(also rediss, valkey, valkeys)",
        ),
    )
    cluster_key_file: Path | None = field(
        default=None,
        metadata=_about(_optional(_path), "file with the cluster's secret; without one nothing but loopback is served"),
    )
    datacenter: str = field(default="default", metadata=_about(_label, "datacenter this host states to its peers"))
    prefer: tuple[str, ...] = field(
        default=_PLACES,
        metadata=_about(
            _prefer,
            "whom chunks come from, best first: local (peers of this datacenter), then origin and remote (peers of "
            "others), once a datacenter; without remote: never from those",
        ),
    )
    capacity: int | None = field(
        default=None,
        metadata=_about(_optional(_size), "bytes the store may take: 200GB, 1.5TiB; default: what the disk has"),
    )
    bulk_processes: int | None = field(
        default=None,
        metadata=_about(
            _optional(_count(16)),
            "processes that send to peers, and as many that receive, at most; default: one for four cores, up to 8",
        ),
    )
    peer_streams: int = field(default=1, metadata=_about(_count(1024), "connections of one such process to one peer"))
    peer_bandwidth: int | None = field(
        default=None,
        metadata=_about(_optional(_size), "bytes a second fetched from peers at most; default: no cap"),
    )
    serve_bandwidth: int | None = field(
        default=None,
        metadata=_about(_optional(_size), "bytes a second sent to peers at most, all together; default: no cap"),
    )
    dirty_budget: int | None = field(
        default=None,
        metadata=_about(
            _optional(_size), "bytes that may wait in memory for the disk; default: half of what the kernel allows"
        ),
    )
    fresh: float = field(
        default=60.0,
        metadata=_about(_seconds(0), "seconds for which a peer's resolution of a mutable source is believed"),
    )
    metrics: str | None = field(
        default=None,
        metadata=_about(_optional(_address), "HOST:PORT for /metrics and /healthz over TCP; default: none"),
    )
    origin: OriginConfig = field(default_factory=OriginConfig, metadata={"table": OriginConfig})

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", self.store.expanduser())

    @property
    def socket_path(self) -> Path:
        """Where the daemon's Unix socket is. Raises ConfigError if the kernel could not take such a path."""
        path = self.socket or self.store / "daemon.sock"
        if (length := len(os.fsencode(path))) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"socket {path}: {length} bytes, but the path of a Unix socket has at most {MAX_SOCKET_PATH}; "
                "set socket to a shorter path"
            )
        return path

    @property
    def advertised(self) -> str:
        """The host that peers are told to connect to. Raises ConfigError if only this host's operator can know it."""
        listen = parse_address(self.listen)
        if self.advertise is None and listen.is_wildcard:
            raise ConfigError(f"listen is {listen}, every interface: set advertise to the host that peers connect to")
        return self.advertise or listen.host

    def validate(self) -> None:
        """Raise ConfigError if the settings contradict each other, or would serve strangers."""
        kind, name, port = parse_discover(self.discover)
        if self.peers and kind != "static":
            raise ConfigError(
                f"discover is {without_secrets(self.discover)}, so peers would be ignored: remove one of the two"
            )
        if kind == "dns" and not port and not parse_address(self.listen).port:
            raise ConfigError(f"discover is {self.discover} without a port and listen has none to go by: add :PORT")
        _ = self.socket_path, self.advertised
        if self.cluster_key_file is None:
            self._stay_local(Address(name, port) if kind in ("dns", "redis") else None)

    def _stay_local(self, asked: Address | None) -> None:
        reached = [("listen", self.listen), *(("peers", peer) for peer in self.peers)]
        if self.metrics is not None:
            reached.append(("metrics", self.metrics))
        if asked is not None:
            reached.append(("discover", str(asked)))
        for key, address in reached:
            if not parse_address(address).is_loopback:
                raise ConfigError(
                    f"{key} has {address}, which is not loopback, and there is no cluster key: set cluster_key_file "
                    "on every host to the same key (openssl rand -hex 32 > FILE; chmod 600 FILE)"
                )


def socket_folder() -> str:
    """Where sockets of a process' own may lie: with the temporary files, unless the kernel would cut their paths."""
    import tempfile  # a worker with a daemon needs none

    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) < MAX_SOCKET_PATH - 64 else "/tmp"


def cluster_key(config: Config) -> bytes | None:
    """The cluster's secret, or None if none is configured. Raises ConfigError; no error tells what is in the file."""
    path = config.cluster_key_file
    if path is None:
        return None
    try:
        # Not blocking: a FIFO in its place must not hang the daemon.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"cluster_key_file {path} is not a regular file")
            if status.st_mode & 0o077:
                raise ConfigError(f"cluster_key_file {path} can be read by others than its owner: chmod 600 {path}")
            key = file.read(MAX_KEY + 1).strip()
    except OSError as error:
        raise ConfigError(f"cluster_key_file {path}: {error.strerror}") from None
    if not MIN_KEY <= len(key) <= MAX_KEY:
        raise ConfigError(
            f"cluster_key_file {path} holds {len(key) if len(key) <= MAX_KEY else 'too many'} bytes, "
            f"{MIN_KEY} to {MAX_KEY} are needed: openssl rand -hex 32 > {path}"
        )
    return key


@dataclass(frozen=True, slots=True)
class Setting:
    """One key: its spelling in the environment, its default, its documentation, and the reader of its values."""

    key: str
    variable: str
    default: object
    doc: str
    read: Reader


def settings() -> tuple[Setting, ...]:
    """Every setting there is, in the order of the documentation."""
    return tuple(_settings(Config, ""))


def _settings(table: type, prefix: str) -> Iterator[Setting]:
    for entry in fields(table):
        key = prefix + entry.name
        if "table" in entry.metadata:
            yield from _settings(entry.metadata["table"], key + ".")
        else:
            variable = _PREFIX + key.replace(".", "_").upper()
            yield Setting(key, variable, entry.default, entry.metadata["doc"], entry.metadata["read"])


def load_config(
    overrides: Mapping[str, object] | None = None,
    file: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """The settings in force. ``overrides`` (dotted keys; None: not given) > ``environ`` > TOML file > defaults.

    The file is ``file``, else WEIGHTCACHE_CONFIG, else ~/.config/weightcache/config.toml if there is one. Raises
    ConfigError that names the place, the key, and what was expected there. What the values mean together is left to
    ``Config.validate``: a worker needs the socket's path, not a network that is safe to serve.
    """
    keys = {setting.key: setting for setting in settings()}
    variables = {setting.variable: setting for setting in keys.values()}
    said: list[tuple[str, Setting, object]] = []  # place, setting, value: the last one wins
    if (path := _find_file(file, environ)) is not None:
        for key, value in _flat(_parse_toml(path), keys):
            said.append((f"{path}: {key}", _known(key, keys, str(path)), value))
    for variable, value in environ.items():
        if variable.startswith(_PREFIX) and variable not in _NO_SETTINGS:
            said.append((variable, _known(variable, variables, "environment"), value))
    for key, value in (overrides or {}).items():
        if value is not None:
            said.append((f"command line: {key}", _known(key, keys, "command line"), value))
    values: dict[str, object] = {}
    for place, setting, value in said:
        try:
            values[setting.key] = setting.read(value)
        except ValueError as error:
            shown = value[0] if isinstance(value, list) and len(value) == 1 else value  # an option given once
            raise ConfigError(f"{place}: {without_secrets(shown)[:100]!r}: {error}") from None
    config: Config = _build(Config, values, "")
    return config


def _find_file(file: str | Path | None, environ: Mapping[str, str]) -> Path | None:
    """The TOML file to read; only the default one may be missing."""
    named = file or environ.get(_FILE_VARIABLE)
    try:
        path = Path(named or _DEFAULT_FILE).expanduser()
        return path if named or path.exists() else None
    except (RuntimeError, OSError):  # no home to look in
        if not named:
            return None
        raise ConfigError(f"configuration file {named} cannot be found") from None


def _parse_toml(path: Path) -> dict[str, object]:
    import tomllib  # only who has a file pays for it

    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"configuration file {path} is not TOML: {error}") from None


def _flat(table: Mapping[str, object], keys: Mapping[str, Setting], prefix: str = "") -> Iterator[tuple[str, object]]:
    """A table's entries with dotted keys; an empty table that no key lies in stays, to be told as unknown."""
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and (value or any(known.startswith(key + ".") for known in keys)):
            yield from _flat(value, keys, key + ".")
        else:
            yield key, value


def _known(name: str, known: Mapping[str, Setting], place: str) -> Setting:
    if name in known:
        return known[name]
    from difflib import get_close_matches  # only a mistake pays for it

    (closest,) = get_close_matches(name, known, n=1, cutoff=0.0)
    raise ConfigError(f"{place}: unknown setting {name[:100]!r}; the closest there is: {closest}")


def _build(table: type, values: Mapping[str, object], prefix: str) -> Any:
    given: dict[str, object] = {}
    for entry in fields(table):
        key = prefix + entry.name
        if "table" in entry.metadata:
            given[entry.name] = _build(entry.metadata["table"], values, key + ".")
        elif key in values:
            given[entry.name] = values[key]
    return table(**given)
