"""TVM's modules as untyped names: its annotations are wrong in places, so no checker is to read them.

TVM 0.27: `te` writes what is computed, `tirx` expressions of it, `s_tir` schedules how.
"""

from typing import Any

import tvm as _tvm
import tvm_ffi as _tvm_ffi
from tvm import s_tir as _s_tir
from tvm import te as _te
from tvm import tirx as _tirx

tvm: Any = _tvm
tvm_ffi: Any = _tvm_ffi
s_tir: Any = _s_tir
te: Any = _te
tirx: Any = _tirx
