"""Flags, variables, a file and defaults make one configuration, and say where each value is from."""

import argparse
import tomllib

import pytest

from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.server.config import ServerConfig
from treadle.runtime.server.settings import add_settings, print_settings, read_settings, settings


def parse(*arguments):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_settings(parser)
    return vars(parser.parse_args(arguments))


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("port = 1\nmax_messages = 2\nmax_choices = 3\n")
    flags = parse("--port", "7", "--config", str(file))
    found = read_settings(flags, {"TREADLE_PORT": "6", "TREADLE_MAX_MESSAGES": "5"})
    assert (found.config.port, found.config.max_messages, found.config.max_choices) == (7, 5, 3)
    assert found.config.host == ServerConfig().host
    expected = {"port": "--port", "max_messages": "TREADLE_MAX_MESSAGES", "max_choices": str(file)}
    assert found.sources == expected


def test_a_variable_names_the_file(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('model = "random:tiny-llama"')
    assert read_settings({}, {"TREADLE_CONFIG": str(file)}).config.model == "random:tiny-llama"


SAMPLES = {"host": "localhost", "engine": "in-process", "device": "cuda", "dtype": "float32", "weights": "full"}
SAMPLES |= {"log_format": "json", "log_level": "debug"}


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)
def test_every_setting_can_be_given_in_all_three_ways_and_printed(setting, tmp_path):
    sample = SAMPLES.get(setting.name, {int: 7, float: 2.5, bool: True, tuple: ("a", "b"), str: "some"}[setting.kind])
    text = ",".join(sample) if setting.kind is tuple else str(sample)
    flag = [setting.flag] if setting.kind is bool else [text] if setting.name == "model" else [setting.flag, text]
    by_flag = read_settings(parse(*flag), {})
    by_variable = read_settings({}, {setting.variable: text})
    file = tmp_path / "printed.toml"
    file.write_text(print_settings(by_flag))
    by_file = read_settings({"config": str(file)}, {})
    assert by_flag.config == by_variable.config == by_file.config
    assert getattr(by_flag.config, setting.name) == sample


def test_what_is_printed_is_toml_that_says_where_values_are_from():
    printed = print_settings(read_settings(parse("--port", "9"), {}))
    assert tomllib.loads(printed)["port"] == 9
    assert "port = 9  # --port" in printed.splitlines()
    assert "max_choices = 16  # default" in printed.splitlines()


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("max-mesages = 3")
    with pytest.raises(InvalidRequestError, match="did you mean 'max_messages'"):
        read_settings({"config": str(file)}, {})


def test_a_variable_that_is_nearly_a_setting_is_refused():
    with pytest.raises(InvalidRequestError, match="did you mean TREADLE_PORT"):
        read_settings({}, {"TREADLE_PROT": "80"})


@pytest.mark.parametrize("variable", ["TREADLE_CACHE", "TREADLE_SERVICE_HOST", "TREADLE_KEY", "TREADLE_URL", "PORT"])
def test_a_variable_of_somebody_else_is_left_alone(variable):
    assert read_settings({}, {variable: "x"}).config == ServerConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = true", "not a whole number"),
        ("port = 1.5", "not a whole number"),
        ('port = "80"', "not a whole number"),
        ("body_timeout_s = nan", "not a finite number"),
        ("body_timeout_s = 0", "at least"),
        ("port = 65536", "at most 65535"),
        ("max_programs = 8193", "at most 8192"),
        ("open_access = 1", "not true or false"),
        ('device = "tpu"', "not one of cpu, cuda"),
        ('aliases = "gpt"', "not a list of strings"),
        ("[limits]\nmax_messages = 1", "there is no setting 'limits'"),
        ("port = ", "not TOML"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(text, message, tmp_path):
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read_settings({"config": str(file)}, {})


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_settings({"config": str(tmp_path / "none.toml")}, {})


def test_a_bad_flag_is_refused():
    with pytest.raises(argparse.ArgumentError, match="not a whole number"):
        parse("--port", "http")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu.example.org"])
def test_listening_to_others_needs_keys_or_a_word(host):
    with pytest.raises(InvalidRequestError, match="API keys"):
        ServerConfig(host=host)
    assert not ServerConfig(host=host, keys="keys.toml").is_local
    assert not ServerConfig(host=host, open_access=True).is_local


def test_settings_of_the_engine_reach_it():
    config = ServerConfig(device="cuda", kv_pages=9, threads=2, max_running=3).engine_config()
    assert (config.device, config.num_pages, config.num_threads, config.num_slots) == ("cuda", 9, 2, 3)
