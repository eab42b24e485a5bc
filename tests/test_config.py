"""Settings: where they come from, what they may be, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.address import parse_redis
from weightcache.config import Config, OriginConfig, cluster_key, load_config, parse_address, settings
from weightcache.errors import ConfigError

SECRET = "5f2c9a1e7b3d4c6f8a0b1c2d3e4f5a6b"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_nothing_said_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(environ={}) == Config()
    assert Config().store == Path.home() / ".cache/weightcache"


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.toml",
        'datacenter = "file"\ncapacity = 1000\nfresh = 5\n[origin]\nstreams = 2\nattempts = 3\nallow = ["s3://a/"]\n',
    )
    environ = {
        "WEIGHTCACHE_CAPACITY": "1.5TiB",
        "WEIGHTCACHE_FRESH": "1.5",
        "WEIGHTCACHE_ORIGIN_STREAMS": "4",
        "WEIGHTCACHE_ORIGIN_FILE_ROOTS": "/a, /b",
        "HOME": "/nowhere",
    }
    found = load_config({"fresh": "30", "origin.timeout": 9, "metrics": None}, file, environ)
    origin = OriginConfig(("s3://a/",), (Path("/a"), Path("/b")), streams=4, attempts=3, timeout=9.0)
    assert found == Config(datacenter="file", capacity=3 << 39, fresh=30.0, origin=origin)


def test_the_file_is_found_by_variable_or_in_its_usual_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = write(tmp_path / "named.toml", 'datacenter = "named"')
    assert load_config(environ={"WEIGHTCACHE_CONFIG": str(named)}).datacenter == "named"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(environ={}).datacenter == "default"
    (tmp_path / ".config/weightcache").mkdir(parents=True)
    write(tmp_path / ".config/weightcache/config.toml", 'datacenter = "usual"')
    assert load_config(environ={}).datacenter == "usual"
    assert load_config(environ={"WEIGHTCACHE_CONFIG": str(named)}).datacenter == "named"
    with pytest.raises(ConfigError, match=r"missing\.toml: No such file"):
        load_config(file=tmp_path / "missing.toml", environ={})


def test_empty_text_takes_a_setting_back(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'metrics = "127.0.0.1:9"\npeers = ["a:1"]')
    found = load_config(file=file, environ={"WEIGHTCACHE_METRICS": "", "WEIGHTCACHE_PEERS": ""})
    assert (found.metrics, found.peers) == (None, ())


@pytest.mark.parametrize(
    ("text", "place", "closest"),
    [
        ('listne = "127.0.0.1:1"', "'listne'", "listen"),
        ("[origin]\nstream = 2", "'origin.stream'", "origin.streams"),
        ("[orign]\nstreams = 2", "'orign.streams'", "origin.streams"),
        ("[orign]", "'orign'", "origin"),
        (f'cluster_key = "{SECRET}"', "'cluster_key'", "cluster_key_file"),
    ],
)
def test_an_unknown_key_of_the_file_is_named_with_the_closest(
    tmp_path: Path, text: str, place: str, closest: str
) -> None:
    file = write(tmp_path / "c.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(file=file, environ={})
    message = str(caught.value)
    assert str(file) in message
    assert place in message
    assert closest in message.partition("closest")[2]
    assert SECRET not in message


def test_an_unknown_variable_or_option_is_named_with_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'WEIGHTCACHE_CLUSTER_KEY'.* WEIGHTCACHE_CLUSTER_KEY_FILE") as caught:
        load_config(environ={"WEIGHTCACHE_CLUSTER_KEY": SECRET})
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError, match=r"command line: .*'origin\.strems'.* origin\.streams"):
        load_config({"origin.strems": 4}, environ={})


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.toml is not TOML: .*end of document"):
        load_config(file=write(tmp_path / "c.toml", "listen = "), environ={})
    with pytest.raises(ConfigError, match="directory"):
        load_config(file=tmp_path, environ={})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200GB", 200 * 10**9),
        ("1.5TiB", 3 << 39),
        ("1 kib", 1024),
        ("17", 17),
        ("17B", 17),
        (17, 17),
        ("2PB", 2 * 10**15),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert load_config({"capacity": text}, environ={}).capacity == size


REFUSED: dict[str, tuple[object, ...]] = {
    "capacity": ("0", "-1", "200G", "GB", "1e9", "0.1B", "\u0663GB", True, 1.5, "9" * 5000, [1]),
    "fresh": ("-1", "nan", "inf", "soon", "1m", True, [], 10**400),
    "origin.timeout": ("0", "0.01"),
    "bulk_processes": ("0", "17"),
    "origin.streams": ("0", "1025", "1.5", "-1", True, 2.0, "²"),
    "origin.allow": ("bucket",),
    "listen": (
        *("localhost", ":1", "a:b", "a:65536", "::1:80", "[::1]", "1.2.3.4.5:1", "a b:1", 80, "a:-1", "h:\u0661"),
        "a:65535",  # bulk data has the next port
    ),
    "peers": ("a:0", "a", "0.0.0.0:1", "a:1,b", 7, [["a:1"]], {"a": 1}),
    "discover": (
        *("dns", "dns:", "dns:a b", "dns:a:b", "zeroconf:x", "redis", "", "redis:", "redis://", "redis://h:x", 5),
        *("redis://h/zero", "redis://h/0/1", "redis://h?db=1", "redis://0.0.0.0", "redis://a b", "unix:///run/redis"),
    ),
    "prefer": ("", "remote", "origin,local", "local", "local,remote", "local,origin,origin", "local,origin,far", 3),
    "advertise": ("0.0.0.0", "::", "a:1", "a/b"),
    "datacenter": ("", "a b", "x" * 65),
    "store": ("", "~nobody-of-that-name/x", "a\0b", 3),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_what_no_reader_takes_is_told_with_its_place(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^command line: {key}: .* expected|^command line: store: ") as caught:
        load_config({key: value}, environ={})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(
    st.sampled_from([setting.key for setting in settings()]), st.text() | st.integers() | st.floats() | st.booleans()
)
def test_no_value_raises_anything_else(key: str, value: object) -> None:
    try:
        load_config({key: value}, environ={})
    except ConfigError:
        pass


def test_a_bad_value_names_its_variable_or_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^WEIGHTCACHE_ORIGIN_STREAMS: 'many': "):
        load_config(environ={"WEIGHTCACHE_ORIGIN_STREAMS": "many"})
    with pytest.raises(ConfigError, match=r"^command line: peers: 'here': "):  # as an option's list of one value
        load_config({"peers": ["here"]}, environ={})
    file = write(tmp_path / "c.toml", "[origin]\nstreams = 0")
    with pytest.raises(ConfigError, match=rf"^{file}: origin\.streams: '0': "):
        load_config(file=file, environ={})


@pytest.mark.parametrize("text", ["127.0.0.1:80", "[::1]:80", "host.example:0", "a_b-c:65535"])
def test_addresses_come_back_as_written(text: str) -> None:
    assert str(parse_address(text)) == text


def test_paths_are_expanded_and_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    found = load_config({"store": "~/models", "cluster_key_file": "key"}, environ={})
    assert (found.store, found.cluster_key_file) == (Path("/home/someone/models"), tmp_path / "key")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_no_key(address: str) -> None:
    Config(listen=address, metrics=address).validate()
    Config(peers=(address,)).validate()


@pytest.mark.parametrize(
    "exposed",
    [
        {"listen": "0.0.0.0:7000", "advertise": "10.0.0.1"},
        {"listen": "[::]:7000", "advertise": "10.0.0.1"},
        {"listen": "10.0.0.1:7000"},
        {"listen": "localhost.example:7000"},
        {"metrics": "0.0.0.0:9090"},
        {"peers": ("localhost:1", "10.0.0.2:7000")},
        {"discover": "dns:fleet.example:7000"},
        {"discover": "redis://fleet.example"},
        {"discover": "rediss://user:word@10.0.0.1:7000/3"},
    ],
)
def test_more_than_loopback_without_a_key_is_refused_with_the_way_out(
    exposed: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"not loopback.*cluster_key_file.*openssl rand -hex 32 > FILE"):
        load_config(exposed, environ={}).validate()
    load_config(exposed | {"cluster_key_file": tmp_path / "key"}, environ={}).validate()


@pytest.mark.parametrize(
    ("text", "public", "user", "password", "tls"),
    [
        ("redis://host", "redis://host:6379/0", None, None, False),
        ("valkey://:p%40ss%2F@host:1/3", "valkey://host:1/3", None, "p@ss/", False),
        ("rediss://me:word@[::1]:7/15", "rediss://[::1]:7/15", "me", "word", True),
        ("valkeys://me@10.0.0.1/", "valkeys://10.0.0.1:6379/0", "me", None, True),
    ],
)
def test_redis_urls(text: str, public: str, user: str | None, password: str | None, tls: bool) -> None:
    url = parse_redis(text)
    assert (url.public, url.user, url.password, url.tls) == (public, user, password, tls)
    assert load_config({"discover": text}, environ={}).discover == text


@pytest.mark.parametrize(
    "text", ["redis://:{}@h:x", "redis:{}@h", "redis://u:{}@", "redis://u:{}/@h/x", "wrong://{}@h"]
)
def test_no_message_holds_a_password(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"discover": text.format(SECRET)}, environ={})
    assert SECRET not in str(caught.value)
    config = load_config({"discover": f"redis://:{SECRET}@h", "peers": ["localhost:1"]}, environ={})
    with pytest.raises(ConfigError, match="peers would be ignored") as caught:
        config.validate()
    assert SECRET not in str(caught.value) + repr(config)


def test_where_chunks_come_from_is_a_list_however_it_is_given() -> None:
    for said in ("local,remote,origin", ["local", "remote", "origin"], ["local,remote", "origin"]):
        assert load_config({"prefer": said}, environ={}).prefer == ("local", "remote", "origin")
    assert load_config({"prefer": "local, origin"}, environ={}).prefer == ("local", "origin")


def test_every_interface_needs_a_host_to_advertise(tmp_path: Path) -> None:
    everywhere = Config(listen="0.0.0.0:7000", cluster_key_file=tmp_path / "key")
    with pytest.raises(ConfigError, match="set advertise"):
        everywhere.validate()
    assert Config(listen="10.0.0.1:7000").advertised == "10.0.0.1"
    assert Config(listen="0.0.0.0:7000", advertise="gpu7").advertised == "gpu7"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"discover": "zeroconf", "peers": ("localhost:1",)}, "peers would be ignored"),
        ({"discover": "dns:localhost"}, "add :PORT"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_config(settings, environ={}).validate()


def test_a_socket_path_the_kernel_would_cut_is_refused() -> None:
    assert Config(store=Path("/s")).socket_path == Path("/s/daemon.sock")
    assert Config(socket=Path("/run/w.sock")).socket_path == Path("/run/w.sock")
    fits = Path("/" + "é" * 53)  # 107 bytes, though 54 characters
    assert Config(socket=fits).socket_path == fits
    with pytest.raises(ConfigError, match=r"108 bytes.*at most 107.*set socket"):
        Config(socket=Path("/" + "s" * 107)).validate()


def test_the_key_is_read_without_its_line_end(tmp_path: Path) -> None:
    path = write(tmp_path / "key", SECRET + "\n")
    assert cluster_key(Config(cluster_key_file=path)) == SECRET.encode()
    assert cluster_key(Config()) is None
    assert SECRET not in repr(Config(cluster_key_file=path))


@pytest.mark.parametrize(
    ("text", "mode", "what"),
    [
        ("", 0o600, "holds 0 bytes.*openssl"),
        ("\n" * 40, 0o600, "holds 0 bytes.*openssl"),
        (SECRET[:15], 0o400, "holds 15 bytes.*16"),
        (SECRET * 200, 0o600, "too many bytes"),
        (SECRET, 0o640, "chmod 600"),
        (SECRET, 0o604, "chmod 600"),
        (SECRET, 0o610, "chmod 600"),
    ],
)
def test_a_key_file_that_is_no_secret_is_refused_and_not_told(tmp_path: Path, text: str, mode: int, what: str) -> None:
    path = write(tmp_path / "key", text, mode)
    with pytest.raises(ConfigError, match=what) as caught:
        cluster_key(Config(cluster_key_file=path))
    assert SECRET[:15] not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_key_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, what in ((tmp_path / "missing", "No such file"), (tmp_path, "director"), (tmp_path / "fifo", "regular")):
        with pytest.raises(ConfigError, match=what):
            cluster_key(Config(cluster_key_file=path))


def test_every_setting_is_documented_once_and_can_be_said_by_variable() -> None:
    table = settings()
    assert len({setting.variable for setting in table}) == len(table) > 10
    for setting in table:
        assert len(setting.doc) > 10
        given = "" if setting.default is None else setting.default
        text = ",".join(given) if isinstance(given, tuple) else str(given)
        assert load_config(environ={setting.variable: text}) == Config(), setting.key


def test_reading_settings_costs_a_worker_next_to_nothing() -> None:
    def run() -> tuple[float, set[str]]:
        """Seconds spent in modules of ours, and all that was imported."""
        command = [sys.executable, "-X", "importtime", "-c", "import weightcache.config"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()[1:]
        costs = {name.strip(): int(own) / 1e6 for own, _, name in (line[12:].split("|") for line in lines)}
        return sum(cost for name, cost in costs.items() if name.startswith("weightcache")), set(costs)

    runs = [run() for _ in range(3)]
    assert min(cost for cost, _ in runs) < 0.03  # seconds; 0.01 on an idle machine
    heavy = {
        "aiohttp",
        "huggingface_hub",
        "lmdb",
        "obstore",
        "prometheus_client",
        "pydantic",
        "redis",
        "rich",
        "zeroconf",
        "torch",
    }
    assert not runs[0][1] & heavy
