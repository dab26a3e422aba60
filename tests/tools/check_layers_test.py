#!/usr/bin/env python3
"""Shows that tools/check_layers.py finds each kind of breach in a planted tree, and nothing in a clean one."""
import pathlib
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
sys.dont_write_bytecode = True
import check_layers  # noqa: E402

CLEAN = {
    "src/base/error.h": "#pragma once\n// exit(1) and printf(\"x\") only in a comment\n",
    "src/base/text.cc": 'char* s = "printf(exit(getenv"; int n = snprintf(a, 1, "");\nvoid f() { on_exit_(); x.exit(); }\n',
    "src/kernels/norm.cc": '#include "base/error.h"\n#include <vector>\n',
    "src/kernels/cpu/norm.cc": '#include "kernels/cpu/ops.h"\n#include "hwy/highway.h"\n',
    "src/kernels/cuda/norm.cu": "#include <cuda_runtime.h>\n",
    "src/cli/main.cc": '#include "runtime/engine.h"\nint main() { std::cout << 1; exit(1); }\n',
    "src/cli/options.cc": 'const char* home = std::getenv("HOME");\n',
    "tests/kernels/norm_test.cc": '#include "kernels/cpu/ops.h"\n',
    "tests/golden/long.txt": "\n" * 5000,
}


class CheckLayers(unittest.TestCase):
    def breaches(self, name=None, text=None):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            files = {**CLEAN, "docs/ARCHITECTURE.md": (ROOT / "docs/ARCHITECTURE.md").read_text()}
            if name:
                files[name] = text
            for path, content in files.items():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(content)
            return check_layers.check(root)[0]

    def test_a_clean_tree_passes(self):
        self.assertEqual(self.breaches(), [])

    def test_this_tree_has_the_table(self):
        rules = check_layers.table(ROOT / "docs/ARCHITECTURE.md")
        self.assertEqual(rules["base"], set())
        self.assertEqual(rules["model"], {"base", "checkpoint", "kernels"})
        self.assertIsNone(rules["cli"])
        self.assertNotIn("train", rules["runtime"])
        self.assertNotIn("runtime", rules["train"])

    def test_each_planted_breach_is_found(self):
        for name, text, says in [
            ("src/base/bad.h", '#include "kernels/backend.h"\n', "base/ may not include kernels/"),
            ("src/runtime/bad.cc", '#include "train/data.h"\n', "runtime/ may not include train/"),
            ("src/train/bad.cc", '  #  include "runtime/engine.h"\n', "train/ may not include runtime/"),
            ("src/text/bad.cc", "#include <checkpoint/config.h>\n", "text/ may not include checkpoint/"),
            ("src/model/bad.cc", '#include "../runtime/engine.h"\n', "write includes from src/"),
            ("src/model/bad.cc", '#include "weights.h"\n', "write includes from src/"),
            ("src/stray/bad.cc", "\n", "src/stray is not in the table"),
            ("src/model/bad.cc", '#include "kernels/cpu/ops.h"\n', "belongs to one backend"),
            ("src/kernels/cuda/bad.cu", '#include "kernels/cpu/ops.h"\n', "belongs to one backend"),
            ("tests/model/bad_test.cc", '#include "kernels/cpu/ops.h"\n', "belongs to one backend"),
            ("src/model/bad.cc", "#include <cuda_runtime.h>\n", "breaks the build without CUDA"),
            ("src/kernels/bad.h", "#include <cublasLt.h>\n", "breaks the build without CUDA"),
            ("tests/kernels/bad_test.cc", "#include <nccl.h>\n", "breaks the build without CUDA"),
            ("src/base/bad.cc", 'void f() { std::cerr << "x"; }\n', "prints"),
            ("src/base/bad.cc", 'void f() { std::fprintf(stderr, "x"); }\n', "prints"),
            ("src/text/bad.cc", "void f() { printf(s); }\n", "prints"),
            ("src/runtime/bad.cc", "void f() { std::exit(1); }\n", "ends the process"),
            ("src/cli/options.cc", "void f() { exit(1); }\n", "ends the process"),
            ("src/model/bad.cc", "void f() { abort(); }\n", "ends the process"),
            ("src/base/bad.cc", 'auto p = std::getenv("X");\n', "reads the environment"),
            ("src/cli/main.cc", 'auto p = getenv("X");\n', "reads the environment"),
            ("src/base/long.cc", "\n" * 801, "801 lines, limit 800"),
            ("tests/base/long_test.cc", "\n" * 801, "801 lines, limit 800"),
            ("tools/long.py", "\n" * 801, "801 lines, limit 800"),
        ]:
            with self.subTest(name=name, text=text[:40]):
                found = self.breaches(name, text)
                self.assertTrue(any(b.startswith(name) and says in b for b in found), found)


if __name__ == "__main__":
    unittest.main()
