"""Sources are configuration: they are named in YAML by class and arguments."""

import pytest
import yaml
from jsonargparse import ArgumentParser

from pgl.data.sources import FineWeb, Shards, Source, Stdlib, Text

CONFIGS = [
    (Shards, {"directory": "some/where"}),
    (FineWeb, {"variant": "sp4096", "train_shards": 10}),
    (Text, {"paths": ["a.txt", "b"], "document_separator": "\n\n"}),
    (Stdlib, {"modules": ["random"]}),
]


@pytest.mark.parametrize(("kind", "arguments"), CONFIGS)
def test_round_trip_through_yaml(kind, arguments):
    parser = ArgumentParser()
    parser.add_subclass_arguments(Source, "source")
    class_path = f"pgl.data.sources.{kind.__name__}"
    config = parser.parse_object({"source": {"class_path": class_path, "init_args": arguments}})
    again = parser.parse_object(yaml.safe_load(parser.dump(config)))
    assert again == config
    # jsonargparse renamed the method in 4.49.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert isinstance(instantiate(again).source, kind)


def test_misspelt_argument_is_refused():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    config = {"class_path": "pgl.data.sources.Shards", "init_args": {"directori": "x"}}
    with pytest.raises(Exception, match="directori"):
        parser.parse_object({"source": config})


@pytest.mark.parametrize(("kind", "arguments"), CONFIGS)
def test_every_argument_is_documented(kind, arguments):
    names = [name for name in kind.__init__.__annotations__ if name != "return"]
    for name in names:
        assert f"        {name}: " in kind.__doc__, f"{kind.__name__} says nothing about {name}"
