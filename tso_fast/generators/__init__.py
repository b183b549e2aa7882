"""Generators: token ids in, sampled token ids out, with the same records for every engine.

    Request[] -> Engine.submit ... Engine.collect -> (Completion | Refusal)[]

An engine answers for the cells of its ``EngineSpec``; ``open_engine`` starts one. ``hf`` runs in the process that opens
it, ``vllm`` in its own process (``process.py``), and ``openai`` is a client of a server that the user started.
"""

from tso_fast.generators.engine import Completion as Completion
from tso_fast.generators.engine import Engine as Engine
from tso_fast.generators.engine import EngineSpec as EngineSpec
from tso_fast.generators.engine import Kind as Kind
from tso_fast.generators.engine import Refusal as Refusal
from tso_fast.generators.engine import Request as Request
from tso_fast.generators.engine import Sampling as Sampling
from tso_fast.generators.engine import Server as Server
from tso_fast.generators.engine import generate as generate
from tso_fast.generators.opening import check_available as check_available
from tso_fast.generators.opening import open_engine as open_engine
from tso_fast.generators.opening import prove_models as prove_models
