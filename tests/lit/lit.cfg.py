"""What lit runs here: .mlir and .test files, with attnjit-opt and FileCheck by those names."""

import os

import lit.formats

config.name = "attnjit"
config.test_format = lit.formats.ShTest(execute_external=False)
config.suffixes = [".mlir", ".test"]
config.test_source_root = os.path.dirname(__file__)
config.substitutions += [("attnjit-opt", config.attnjit_opt), ("FileCheck", config.filecheck)]
