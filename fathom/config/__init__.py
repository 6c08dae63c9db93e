"""YAML in, frozen configuration classes out; every mistake named with its file and line.

    file     read(path, overrides) -> Tree         `base:`, dotted overrides, who wrote what where
    parse    parse(tree, cls) -> cls               all errors at once, each with what is possible
    text     dump(config) -> YAML                  which reads back as an equal configuration
    schema   json_schema(cls)                      for editors that complete YAML
    shape    what a configuration class accepts    unions by `kind`, fields, addresses

This room knows no knob by name.
"""
