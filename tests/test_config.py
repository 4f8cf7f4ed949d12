"""Command line and TOML file: what they mean, and that what is wrong is said with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from epochd import config, core
from epochd.errors import ConfigError, ConfigFileError, EpochdError, UsageError

ONE_DISK = ("--blk-file", "disk.img", "--socket-path", "v.sock")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parse(*arguments: str) -> config.Config:
    settings = config.parse(arguments)
    assert settings is not None
    return settings


def parse_toml(text: str, *arguments: str) -> config.Config:
    Path("epochd.toml").write_text(text)
    return parse("--config", "epochd.toml", *arguments)


def disk_table(number: int, **keys: str) -> str:
    table = {"image": f'"{number}.img"', "socket": f'"{number}.sock"', **keys}
    return "\n[[disk]]\n" + "".join(f"{key} = {value}\n" for key, value in table.items() if value)


# ---- sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("512", 512),
        ("4k", 4096),
        ("256M", 256 << 20),
        ("1G", 1 << 30),
        ("2T", 2 << 40),
        ("64KiB", 65536),
        ("64KB", 65536),
        ("512B", 512),
        (" 1 M ", 1 << 20),
    ],
)
def test_a_size_is_bytes_or_has_a_unit(text: object, size: int) -> None:
    assert config.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5G", "1X", "0", "0x10", 0, -5, True, 1.5, None, "9999999T"]
)
def test_what_is_not_a_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"size"):
        config.parse_size(text)


# ---- command line -------------------------------------------------------------------------


def test_one_disk_needs_no_file(tmp_path: Path) -> None:
    settings = parse(*ONE_DISK)
    (disk,) = settings.disks
    assert (disk.name, disk.image) == ("disk.img", tmp_path / "disk.img")
    assert (disk.socket, disk.fd) == (tmp_path / "v.sock", None)
    assert (disk.read_only, disk.serial) == (False, "disk.img")
    assert settings.name == "disk.img"
    assert settings.state_dir == tmp_path
    assert settings.control == tmp_path / "disk.img.control"
    assert settings.journal_path == tmp_path / "disk.img.epochd-journal"
    assert settings.arena_bytes == 512 << 20
    assert (settings.index_bytes, settings.journal_bytes) == (None, None)
    assert (settings.compress_level, settings.spin_us) == (1, 100)


def test_every_flag_counts(tmp_path: Path) -> None:
    settings = parse(
        "--blk-file",
        "disk.img",
        "--fd",
        "7",
        "--read-only",
        "--control",
        "c.sock",
        "--state-dir",
        "state",
        "--arena-size",
        "64M",
        "--index-size",
        "20M",
        "--journal-size",
        "1G",
        "--compress-level",
        "0",
        "--log-level",
        "debug",
    )
    (disk,) = settings.disks
    assert (disk.socket, disk.fd, disk.read_only) == (None, 7, True)
    assert settings.control == tmp_path / "c.sock"
    assert settings.state_dir == tmp_path / "state"
    assert (settings.arena_bytes, settings.journal_bytes) == (64 << 20, 1 << 30)
    assert settings.index_bytes == 20 << 20
    assert (settings.compress_level, settings.log_level) == (0, "debug")


def test_two_links_to_an_image_mean_one_journal(tmp_path: Path) -> None:
    (tmp_path / "disk.img").touch()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "other").symlink_to(tmp_path / "disk.img")
    settings = parse("--blk-file", "links/other", "--socket-path", "v.sock")
    assert settings.journal_path == parse(*ONE_DISK).journal_path


@pytest.mark.parametrize(
    ("image", "name"),
    [("a b.img", "a_b.img"), ("_x", "disk_x"), ("x" * 60, "x" * core.NAME_BYTES_MAX)],
)
def test_a_default_name_is_a_legal_name(image: str, name: str) -> None:
    assert parse("--blk-file", image, "--socket-path", "v.sock").disks[0].name == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no disk"),
        (("--blk-file", "d.img"), "needs either --socket-path or --fd"),
        ((*ONE_DISK, "--fd", "3"), "needs either --socket-path or --fd"),
        (("--socket-path", "v.sock"), "--socket-path needs --blk-file"),
        (("--read-only",), "--read-only needs --blk-file"),
        ((*ONE_DISK, "--nonsense"), "--nonsense"),
        ((*ONE_DISK, "--arena", "64M"), "--arena"),
        ((*ONE_DISK, "--arena-size", "64Q"), "64Q"),
        ((*ONE_DISK, "--arena-size", "4K"), "smallest arena"),
        ((*ONE_DISK, "--index-size", "2047K"), "smallest index"),
        ((*ONE_DISK, "--compress-level", "20"), "0..19"),
        ((*ONE_DISK, "--log-level", "loud"), "loud"),
        (("--blk-file", "d.img", "--fd", "-1"), "-1"),
        (("--blk-file", "d.img", "--fd", "three"), "three"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_empty_image_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="image"):
        parse("--blk-file", "", "--socket-path", "v.sock")


def test_capabilities_are_printed_whatever_else_is_said() -> None:
    assert config.parse(["--nonsense", "--print-capabilities", "--fd", "x"]) is None


# ---- the file -----------------------------------------------------------------------------


def test_every_key_counts(tmp_path: Path) -> None:
    settings = parse_toml(
        'name = "vm1"\nstate-dir = "/var/lib/vm1"\ncontrol = "ctl.sock"\narena-size = "64M"\n'
        "index-size = 2097152\njournal-size = 268435456\ncompress-level = 3\nspin-us = 0\n"
        'apply-rate = "50M"\n'
        + disk_table(0, name='"root"', **{"read-only": "true"}, serial='"R00T"')
        + disk_table(1, image='"/other/1.img"')
    )
    assert settings.name == "vm1"
    assert settings.state_dir == Path("/var/lib/vm1")
    assert settings.control == tmp_path / "ctl.sock"
    assert (settings.arena_bytes, settings.journal_bytes) == (64 << 20, 256 << 20)
    assert settings.index_bytes == 2 << 20
    assert (settings.compress_level, settings.spin_us) == (3, 0)
    assert settings.apply_rate == 50 << 20
    root, other = settings.disks
    assert (root.name, root.read_only, root.serial) == ("root", True, "R00T")
    assert (other.name, other.image) == ("1.img", Path("/other/1.img"))
    assert other.socket == tmp_path / "1.sock"


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "vm.toml").write_text('state-dir = "state"\n' + disk_table(0))
    settings = parse("--config", "etc/vm.toml")
    assert settings.disks[0].image == tmp_path / "etc" / "0.img"
    assert settings.disks[0].socket == tmp_path / "etc" / "0.sock"
    assert settings.state_dir == tmp_path / "etc" / "state"


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    settings = parse_toml(
        'arena-size = "64M"\ncompress-level = 3\ncontrol = "a.sock"\n' + disk_table(0),
        "--arena-size",
        "32M",
        "--compress-level",
        "0",
        "--control",
        "b.sock",
    )
    assert (settings.arena_bytes, settings.compress_level) == (32 << 20, 0)
    assert settings.control == tmp_path / "b.sock"


def test_the_file_may_leave_the_disk_to_the_command_line() -> None:
    settings = parse_toml('arena-size = "64M"\n', *ONE_DISK)
    assert settings.arena_bytes == 64 << 20
    assert settings.disks[0].name == "disk.img"


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("arenasize = 1\n" + disk_table(0), "arenasize", "unknown key"),
        (disk_table(0, imag='"x"'), "disk[0].imag", "unknown key"),
        (disk_table(0) + disk_table(1, sock='"x"'), "disk[1].sock", "unknown key"),
        ("arena-size = true\n" + disk_table(0), "arena-size", "not a size"),
        ('arena-size = "1.5G"\n' + disk_table(0), "arena-size", "not a size"),
        ("arena-size = 4096\n" + disk_table(0), "arena-size", "smallest arena"),
        ("index-size = 4096\n" + disk_table(0), "index-size", "smallest index"),
        ("index-size = false\n" + disk_table(0), "index-size", "not a size"),
        ("journal-size = -1\n" + disk_table(0), "journal-size", "out of range"),
        ('compress-level = "1"\n' + disk_table(0), "compress-level", "not an integer"),
        ("compress-level = true\n" + disk_table(0), "compress-level", "not an integer"),
        ("compress-level = 20\n" + disk_table(0), "compress-level", "0..19"),
        ("spin-us = -1\n" + disk_table(0), "spin-us", "-1"),
        ("apply-rate = 0\n" + disk_table(0), "apply-rate", "out of range"),
        ("control = 5\n" + disk_table(0), "control", "not a string"),
        ('state-dir = ""\n' + disk_table(0), "state-dir", "empty"),
        ('name = "a/b"\n' + disk_table(0), "name", "letters"),
        (f'name = "{"x" * 32}"\n' + disk_table(0), "name", "longer than 31"),
        (disk_table(0, name='"ü"'), "disk[0].name", "letters"),
        (disk_table(0, **{"read-only": '"yes"'}), "disk[0].read-only", "true or false"),
        (disk_table(0, serial='"123456789012345678901"'), "disk[0].serial", "longer than 20"),
        (disk_table(0, serial='"\\u00fc"'), "disk[0].serial", "ASCII"),
        (disk_table(0, image=""), "disk[0].image", "missing"),
        (disk_table(0) + disk_table(1, socket=""), "disk[1].socket", "missing"),
        ("disk = 5\n", "disk", "[[disk]]"),
        ("disk = [1]\n", "disk", "[[disk]]"),
        (disk_table(0, name='"a"') + disk_table(1, name='"a"'), "disk[1].name", "same"),
        (disk_table(0) + disk_table(1, image='"./0.img"'), "disk[1].", "same"),
        (disk_table(0) + disk_table(1, socket='"0.sock"'), "disk[1].socket", "same"),
        ('control = "0.sock"\n' + disk_table(0), "disk[0].socket", "same as control"),
        (disk_table(0) + disk_table(1, image='"/else/1.img"'), "state-dir", "different folders"),
        ("".join(map(disk_table, range(33))), "disk", "at most 32"),
    ],
)
def test_a_wrong_file_names_itself_and_the_key(text: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_toml(text)
    message = str(caught.value)
    assert message.startswith(f"epochd.toml: {key}")
    assert words in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"= 1", b'name = "a"\nname = "b"\n', b"\xff\xfe", b"[disk"])
def test_what_is_not_toml_is_refused(content: bytes) -> None:
    Path("bad.toml").write_bytes(content)
    with pytest.raises(ConfigFileError, match=r"bad\.toml: not TOML"):
        parse("--config", "bad.toml")


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(name: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        parse("--config", name)
    assert f"configuration file {name}: " in str(caught.value)


def test_a_file_without_a_disk_is_not_enough() -> None:
    with pytest.raises(UsageError, match="no disk"):
        parse_toml('arena-size = "64M"\n')


def test_the_disk_is_described_once() -> None:
    with pytest.raises(UsageError, match="describes disks already"):
        parse_toml(disk_table(0), *ONE_DISK)


def test_a_block_device_needs_a_state_dir(loop_512: Path) -> None:
    arguments = ("--blk-file", str(loop_512), "--socket-path", "v.sock")
    with pytest.raises(ConfigError, match="state-dir"):
        parse(*arguments)
    assert parse(*arguments, "--state-dir", ".").disks[0].image == loop_512


def test_every_error_is_one_sentence_with_its_values() -> None:
    """The messages are docstrings with fields: none may lack one, none may stay unfilled."""
    kinds = [EpochdError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert len(kinds) > 10
    for kind in kinds:
        count = (kind.__doc__ or "").count("{}")
        assert count > 0
        values = [f"<{number}>" for number in range(count)]
        message = str(kind(*values))
        assert all(value in message for value in values)
        assert "\n" not in message
        assert kind.exit_code in range(1, 6)


# ---- a full arena ---------------------------------------------------------------------------


def test_a_full_arena_holds_the_guest_unless_told_otherwise(tmp_path: Path) -> None:
    assert parse(*ONE_DISK).spill_bytes == 0
    assert parse(*ONE_DISK, "--on-full", "hold").spill_bytes == 0
    settings = parse(*ONE_DISK, "--on-full", "spill", "--arena-size", "64M")
    assert settings.spill_bytes == 128 << 20
    assert settings.spill_path == tmp_path / "disk.img.epochd-spill"
    text = 'on-full = "spill"\nspill-size = "1G"\n' + disk_table(0)
    assert parse_toml(text).spill_bytes == 1 << 30
    assert parse_toml(text, "--spill-size", "16M").spill_bytes == 16 << 20


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ('on-full = "wait"\n', "on-full", "not one of hold, spill"),
        ("on-full = [1]\n", "on-full", "not one of hold, spill"),
        ('spill-size = "1G"\n', "spill-size", "means nothing without on-full"),
        ('on-full = "hold"\nspill-size = "1G"\n', "spill-size", "means nothing without"),
        ('on-full = "spill"\nspill-size = "1M"\n', "spill-size", "less than the smallest"),
        ('on-full = "spill"\nspill-size = "128G"\n', "spill-size", "together"),
    ],
)
def test_what_a_full_arena_cannot_do_is_refused(text: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_toml(text + disk_table(0))
    assert str(caught.value).startswith(f"epochd.toml: {key}")
    assert words in str(caught.value)
