"""Processes of the attnjit tool on one disk cache, with real kernels: what an entry tells of itself, and never another
binary when it is damaged. Exit code 77 where there is no NVRTC."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

TOOL = sys.argv.pop(1)
EXPLAIN = [TOOL, "explain", "softcap(30)", "--mask-mod", "causal", "--shape", "1,2,64,2,64,16", "--dtype", "float16",
           "--backend", "sm80", "--arch", "sm_80", "--format", "json"]


def start(directory):
    return subprocess.Popen(EXPLAIN, env={**os.environ, "ATTNJIT_CACHE_DIR": str(directory), "ATTNJIT_DISABLE_CACHE": ""},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class DiskCache(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.directory = pathlib.Path(folder.name) / "cache"

    def finish(self, process):
        """The (key, origin, registers) of each binary that a process asked for."""
        out, err = process.communicate(timeout=300)
        self.assertEqual(process.returncode, 0, err)
        return {(k["key"], k["origin"], k["registers"]) for k in json.loads(out)["kernels"]}

    def entries(self):
        return {path.name: path.read_bytes() for path in self.directory.glob("*.attnjit")}

    def test_an_entry_tells_what_it_is(self):
        ((key, origin, _),) = self.finish(start(self.directory))
        self.assertEqual(origin, "compiled")
        listed = subprocess.run([TOOL, "cache", "verify", "--format", "json"], capture_output=True, text=True, check=True,
                                env={**os.environ, "ATTNJIT_CACHE_DIR": str(self.directory)})
        (entry,) = json.loads(listed.stdout)["entries"]
        self.assertTrue(entry["valid"])
        self.assertRegex(entry["about"], r"^sm_80: attnjit_forward\nscore_mod: .*tanh")
        # Nothing but the entry and the lock.
        self.assertEqual({path.name for path in self.directory.iterdir()}, {key + ".attnjit", "lock"})

    def test_a_damaged_entry_is_never_used(self):
        ((key, origin, _),) = self.finish(start(self.directory))
        self.assertEqual(origin, "compiled")
        ((name, good),) = self.entries().items()
        path = self.directory / name
        # The header, the cubin, the end; flipped, cut, and another entry in its place.
        damaged = [good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1:] for at in (17, len(good) // 2, len(good) - 1)]
        damaged += [good[:len(good) // 3], good.replace(key.encode(), key[::-1].encode())]
        for i, data in enumerate(damaged):
            with self.subTest(damage=i):
                self.assertNotEqual(data, good)
                path.write_bytes(data)
                # Two at once: one replaces it.
                both = [self.finish(process) for process in [start(self.directory), start(self.directory)]]
                self.assertEqual(sorted(origin for kernels in both for _, origin, _ in kernels), ["compiled", "disk"])
                self.assertEqual(self.entries(), {name: good})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as probe:
        process = start(probe)
        _, message = process.communicate()
    if process.returncode == 2 and "NVRTC" in message:
        print("skipped:", message)
        sys.exit(77)
    unittest.main()
